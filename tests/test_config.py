from pathlib import Path

import pytest
import yaml
from conftest import refusal
from hypothesis import given
from hypothesis import strategies as st

from dataset.catalog import dataset_info
from dataset.query import QueryRule
from utils.config.reading import CONFIGS, METHODS, config_from, flatten, read_config
from utils.config.schema import Config
from utils.errors import UserError

SMALL = {
    "name": "small",
    "dataset": {"kind": "demo", "root": "data"},
    "augment": {"base_size": 64, "crop_size": 48},
}


def test_every_shipped_config_loads_and_has_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = [read_config(path.name) for path in CONFIGS.glob("*.yaml")]
    for config in configs:
        QueryRule.of(config.query, dataset_info(config.dataset))
        assert config == config_from(config.model_dump(mode="json"), "checkpoint")
    assert len({config.name for config in configs}) == len(configs)


def keys_of(file):
    return flatten(yaml.safe_load(file.read_text()) or {})


@pytest.mark.parametrize("method", METHODS)
def test_recipes_leave_the_keys_of_methods_to_them(method):
    """Else ``--method`` would not change all that it stands for."""
    overlay = keys_of(CONFIGS / "methods" / f"{method}.yaml")
    for recipe in CONFIGS.glob("*.yaml"):
        assert not overlay.keys() & keys_of(recipe).keys(), recipe.name
        assert read_config(recipe.name, method=method).method == method


def test_a_method_is_named_in_the_file_by_an_option_or_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("base: demo.yaml\nmethod: st++\nselect: {keep: 0.25}\n")
    mine = read_config("mine.yaml")
    assert (mine.method, mine.select.score, mine.select.keep) == ("st++", "stability", 0.25)
    assert read_config("mine.yaml", method="unimatch").retrain.views == 2
    words = ["method=cisc", "retrain.mix=cutout"]
    paper = read_config("mine.yaml", words, "unimatch")
    assert (paper.method, paper.retrain.weight, paper.retrain.mix) == ("cisc", "cisc_map", "cutout")
    Path("bare.yaml").write_text(yaml.safe_dump(SMALL))
    assert read_config("bare.yaml").supervised.consistency == 1  # the paper, if none is named


def test_the_recipes_of_the_paper_are_the_paper():
    for name in ("pascal", "cityscapes", "coco", "camvid"):
        config = read_config(f"{name}.yaml")
        assert (config.method, config.stages) == ("cisc", [1, 2, 3, 4, 5, 6])
        assert (config.supervised.consistency, config.retrain.weight) == (1.0, "cisc_map")
        assert (config.retrain.start, config.retrain.mix) == ("encoder", "none")
        assert not config.pseudo_label.neighbours
    for name in ("demo", "custom", "animals_cpu", "camvid_cpu", "pascal_dinov2", "acdc"):
        assert read_config(f"{name}.yaml").method == "cisc_patch"


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("method=cisc_published", "method: 'cisc_published' is called 'cisc' now"),
        ("method=magic", "method: 'magic' is not one of cisc, cisc_patch"),
        ("relabel=both", "'relabel' is gone: stage 5 labels by the network of stage 4"),
        ("retrain.learn_queried=true", "is called 'retrain.learn_partners' now"),
        ("retrain.threshold_by_class=true", "'retrain.threshold_by_class' is gone"),
        ("retrain.weight=image", "retrain.weight: 'image' is called 'cisc_map' now"),
        ("retrain.weight=bank", "retrain.weight: 'bank' is gone"),
        ("retrain.mix=queried", "retrain.mix: 'queried' is gone"),
    ],
)
def test_keys_and_values_of_earlier_versions_are_named(setting, told):
    assert told in refusal(read_config, "demo.yaml", [setting])


def test_patience_and_networks_of_thirds_of_stage_1_do_not_go_together():
    line = refusal(read_config, "demo.yaml", ["evaluate.patience=3"], "st++")
    assert line.endswith("set evaluate.patience=null, or select.score=sum")
    for word in ("evaluate.patience=null", "select.score=sum"):
        read_config("demo.yaml", ["evaluate.patience=3", word], "st++")
    words = ["evaluate.patience=3", "select.score=stability"]
    assert 3 not in read_config("demo.yaml", words, "unimatch").stages


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_settings_over_a_config(method):
    config = read_config("demo.yaml", ["retrain.threshold=0.3"], method)
    assert config.retrain.threshold == 0.3  # the command line comes last
    assert config.dataset == read_config("demo.yaml").dataset
    assert (6 in config.stages) == (method != "supervised")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=-1", r"seed: -1 is not allowed: .*greater than or equal to 0"),
        ("workers=two", r"workers: 'two' is not allowed: an integer"),
        ("augment.crop_size=1.5", r"augment\.crop_size: 1\.5 is not allowed: .*integer"),
        ("precision=fp8", r"precision: 'fp8' is not allowed: .*'auto', 'fp32', 'bf16' or 'fp16'"),
        ("model.output_stride=4", r"model\.output_stride: 4 is not allowed: .*8, 16 or 32"),
        ("supervised.batch_size=1", r"supervised\.batch_size: 1 is not allowed: .*greater than 1"),
        ("augment.scale=[2, 1]", r"the smaller number comes first"),
        ("query.exclude=fish", r"query\.exclude: 'fish' is not allowed: .*list"),
        ("name=a/b", r"name: 'a/b' is not allowed"),
        ("cache=disk", r"cache: 'disk' is not allowed: .*'ram'"),
        ("dataset.ignore=[255, -1]", r"dataset\.ignore: -1 is not allowed: .*equal to 0"),
        ("dataset.class_map.70000=a", r"dataset\.class_map\.70000: .* from 0 to 65535.*'other'"),
        ("dataset.class_map={'#ff00': a}", r"dataset\.class_map\.#ff00: .* colours from '#000000'"),
        ("dataset.class_map={7: true}", r"dataset\.class_map\.7: True is not allowed: a class is"),
        ("model=3", r"model: 3 is not allowed: a section holds 'key: value' lines"),
        ("device=0", r"device: 0 is not allowed: auto, cpu, cuda, cuda:0 \(the first"),
        ("dataset.classes=[a]", r"\['a'\] is not allowed: two to 255 classes; pixels without an"),
        ("dataset.classes=[1, 2]", r"dataset\.classes: 1 is not allowed: text, in quotes where"),
        ("dataset.groups=a(", r"dataset\.groups: 'a\(' is not allowed: no regular expression: mis"),
        ("dataset.bands=4", r"dataset\.bands: 4 is not allowed: a list, such as \[a, b\]"),
        ("dataset.range=[3, 1]", r"dataset\.range: .* two numbers, the lower one first"),
        ("dataset=null", r"dataset: None is not allowed: a section holds"),
        ("loss.class_weights=balance", r"class_weights: 'balance' is not allowed: a number from 0"),
        ("loss.class_weights=[1, -1]", r"loss\.class_weights: .* not all 0; or balanced"),
        ("loss.class_weights=[0, 0]", r"is not allowed: a number from 0 to 1000000 for each class"),
        ("loss.class_weights=[1, .nan]", r"is not allowed: a number from 0 to 1000000"),
        ("loss.dice=-1", r"loss\.dice: -1 is not allowed: .*equal to 0"),
        ("ohem=true", r"ohem: True is not allowed: a section holds"),
        ("augment.scale=[1]", r"augment\.scale: .* is not allowed: there are too few values"),
        ("retrain.accumulate=3", r"accumulate 3 does not cut batch_size 32 into parts of one size"),
        ("retrain.accumulate=32", r"accumulate 32 does not cut batch_size 32"),
        ("pseudo_label.scales=[0]", "is not allowed"),
        ("pseudo_label.scales=[.nan]", "is not allowed"),
        ("augment.scale=[0.5, .inf]", "is not allowed"),
        ("augment.strong.blur=[-1.0, 2.0]", "is not allowed"),
        ("optimizer.lr=.inf", "is not allowed"),
        ("augment.base_size=1000000", r"base_size: 1000000 is not allowed: .*equal to 65500"),
        ("augment={base_size: 60000, scale: [0.5, 2.0]}", "is up to 120000 pixels, beyond 65500"),
        ("augment.crop_size=100000", "less than or equal to 8192"),
        ("augment.scale=[0.5, 1000]", "less than or equal to 16"),
        ("augment.scale=[1.0e-9, 1]", r"greater than or equal to 0\.01"),
        ("augment.aim=1.5", r"augment\.aim: 1\.5 is not allowed: .*equal to 1"),
        ("augment.rotate=181", r"augment\.rotate: 181 is not allowed: .*equal to 180"),
        ("augment.strong.blur=[1, 1.0e+9]", "less than or equal to 100"),
        ("model.channels=10000000", "less than or equal to 8192"),
        ("inference.scales=[1000]", "less than or equal to 16"),
        ("pseudo_label.neighbour_scales=[1000]", "less than or equal to 16"),
        ("inference.long_side=1000000", "less than or equal to 65500"),
        ("inference.window.size=1", "greater than or equal to 32"),
        ("inference.window={size: 64, step: 1.0e-9}", r"greater than or equal to 0\.05"),
        ("workers=300", "less than or equal to 128"),
        ("retrain.views=1000000", "less than or equal to 64"),
        # The run folder would be outdir's parent, whose stages --from-stage removes.
        ("name=..", "is not allowed"),
    ],
)
def test_wrong_value_names_key_value_and_what_is_allowed(setting, message):
    with pytest.raises(UserError, match=f"^command line: .*{message}"):
        config_from(SMALL, "a checkpoint", [setting])


def test_an_aim_that_nothing_would_follow_is_refused():
    settings = ["augment.aim=1", "stages=[1]", "supervised.consistency=1"]
    with pytest.raises(UserError, match=r"augment\.aim .*; set supervised\.consistency=0"):
        config_from(SMALL, "a checkpoint", settings)
    for others in ["supervised.consistency=0"], ["stages=[1,2,6]"]:
        config_from(SMALL, "a checkpoint", [*settings, *others])


def test_queries_need_stored_labels():
    words = ["stages=[1, 6]", "retrain.labels=average"]
    with pytest.raises(UserError, match="stages without 2 do not have"):
        config_from(SMALL, "a checkpoint", [*words, "retrain.learn_partners=true"])
    with pytest.raises(UserError, match="queries by stored pseudo labels"):
        config_from(SMALL, "a checkpoint", ["retrain={labels: average, weight: cisc_map}"])


def test_class_map_is_kept_and_changed_id_by_id():
    dataset = {"kind": "custom", "root": "data", "classes": ["a", "b"]}
    values = {**SMALL, "dataset": {**dataset, "class_map": {3: "a", 4: 1, "other": None}}}
    config = config_from(values, "mine.yaml", ["dataset.ignore=9"])
    assert config.dataset.class_map == {3: "a", 4: 1, "other": None}
    assert config.dataset.ignore == [9]
    kept = config.model_dump(mode="json")  # where ids are text
    assert config_from(kept, "config.yaml") == config
    changed = config_from(kept, "config.yaml", ["dataset.class_map.3=b"])
    assert changed.dataset.class_map == {3: "b", 4: 1, "other": None}
    colours = config_from(kept, "config.yaml", ["dataset.class_map={'#FF0000': a}"])
    assert colours.dataset.class_map["#ff0000"] == "a"
    by_channels = "dataset.class_map={[255, 0, 0]: a, [0,16,255]: b}"
    found = config_from({**SMALL, "dataset": dataset}, "mine.yaml", [by_channels])
    assert found.dataset.class_map == {"#ff0000": "a", "#0010ff": "b"}
    line = refusal(config_from, values, "mine.yaml", ["dataset.class_map={[0,0,256]: a}"])
    assert "or as [255, 0, 0]" in line
    twice = "dataset.class_map={'#FF0000': a, [255, 0, 0]: b}"
    line = refusal(config_from, {**SMALL, "dataset": dataset}, "mine.yaml", [twice])
    assert "#ff0000 is given twice in different spellings" in line


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a YAML file into the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(file, /, **values):
        (tmp_path / file).write_text(yaml.safe_dump(values))

    write("small.yaml", **SMALL)
    return write


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: &x [1]\nb: *x", "aliases .* are not read"),
        ("a: &x {b: 1}\nc: {<<: *x}", "aliases .* are not read"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ('base: small.yaml\ndataset: {classes: [a, "\\uD800"]}', "lone surrogate"),
    ],
)
def test_hostile_yaml_is_refused(write, tmp_path, text, told):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        read_config("bad.yaml")


def test_a_chain_of_bases_has_an_end(write):
    for number in range(30):
        write(f"{number}.yaml", base=f"{number + 1}.yaml")
    with pytest.raises(UserError, match=r"^21\.yaml: more than 20 files in a chain"):
        read_config("0.yaml")


def test_a_value_of_a_billion_parts_is_named_in_short():
    value = "x"
    for _ in range(60):
        value = [value, value]
    with pytest.raises(UserError, match=r"seed: .* is not allowed") as refused:
        config_from({**SMALL, "seed": value}, "a checkpoint")
    assert len(str(refused.value)) < 500


def test_a_home_folder_is_the_users():
    config = config_from(SMALL, "a checkpoint", ["outdir=~/x", "dataset.root=~/y"])
    assert config.outdir == str(Path.home() / "x")
    assert config.dataset.root == str(Path.home() / "y")


def test_bases_are_overridden_key_by_key(write):
    write("middle.yaml", base="small.yaml", seed=3, augment={"crop_size": 32})
    write("top.yaml", base="middle.yaml", name="top", augment={"scale": [1, 2]})
    config = read_config("top.yaml", ["augment.crop_size=16", "seed=4", "seed=5"])
    assert config.name == "top"
    assert config.seed == 5
    augment = config.augment
    assert (augment.base_size, augment.scale, augment.crop_size) == (64, (1.0, 2.0), 16)


def test_a_file_is_looked_for_beside_its_heir_then_here_then_in_configs(write, tmp_path):
    write("demo.yaml", **{**SMALL, "name": "mine"})
    assert read_config("demo.yaml").name == "mine"
    (tmp_path / "sub").mkdir()
    write("sub/base.yaml", **{**SMALL, "seed": 1})
    write("base.yaml", **{**SMALL, "seed": 2})
    write("sub/top.yaml", base="base.yaml")
    assert read_config("sub/top.yaml").seed == 1


def test_hard_pixels_and_class_weights_do_not_go_together(write):
    write("top.yaml", base="small.yaml", ohem={"threshold": 0.5})
    told = refusal(read_config, "top.yaml", ["loss.class_weights=balanced"])
    assert "ohem and loss.class_weights do not go together; set one of them to null" in told
    assert read_config("top.yaml", ["loss.dice=1"]).loss.dice == 1


def test_lists_and_null_replace_rather_than_merge(write):
    write("top.yaml", base="small.yaml", ohem={"threshold": 0.5}, query={"exclude": ["fish"]})
    config = read_config("top.yaml", ["ohem=null", "query.exclude=[mug]"])
    assert config.ohem is None
    assert config.query.exclude == ["mug"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("optimizer.lr=1e-4", 1e-4),  # which YAML 1.1 takes for text
        ("model.pretrained=null", None),
        ("model.pretrained=weights.pth", "weights.pth"),
        ("pseudo_label.scales=[1, 0.5]", [1.0, 0.5]),
        ("pseudo_label.flip=false", False),
        ("dataset.root=/data=1/x", "/data=1/x"),
        ("loss.class_weights=balanced", "balanced"),
        ("loss.class_weights=[1, 2.5, 0]", [1.0, 2.5, 0.0]),
        ("ohem.threshold=0.6", 0.6),
    ],
)
def test_settings_on_the_command_line(write, setting, expected):
    value = read_config("small.yaml", [setting])
    for key in setting.partition("=")[0].split("."):
        value = getattr(value, key)
    assert value == expected


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("inference.scale", "inference.scales"),
        ("model.backbon", "model.backbone"),
        ("sead", "seed"),
        ("retrain.epoch", "retrain.epochs"),
        ("augment.cropsize", "augment.crop_size"),
        ("ohem.min_keep", "ohem.min_kept"),
        ("batch_size", "retrain.batch_size"),  # a section forgotten
        ("lr", "optimizer.lr"),
        ("crop", "augment.crop_size"),
    ],
)
def test_unknown_key_names_the_nearest(write, wrong, nearest):
    line = f"command line: unknown key '{wrong}'; the nearest known key is '{nearest}'"
    assert refusal(read_config, "small.yaml", [f"{wrong}=1"]) == line


def test_error_names_the_file_that_is_wrong(write):
    write("middle.yaml", base="small.yaml", supervised={"epochs": "many"})
    write("top.yaml", base="middle.yaml", supervised={"batch_size": 4})
    with pytest.raises(UserError, match=r"^middle\.yaml: supervised\.epochs: 'many' is not allow"):
        read_config("top.yaml")
    assert read_config("top.yaml", ["supervised.epochs=2"]).supervised.epochs == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("=3", "settings on the command line read key=value"),
        ("seed", "settings on the command line read key=value"),
        ("model=2001-99-99", "'model=2001-99-99': the value is not YAML"),
        ("model=[1", "the value is not YAML"),
        ("model=&a [*a]", "not YAML: aliases .* are not read"),
    ],
)
def test_bad_setting_is_named(setting, message):
    with pytest.raises(UserError, match=message):
        config_from(SMALL, "a checkpoint", [setting])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"bad\.yaml: holds no 'key: value' lines"),
        ("a: [1, 2\nb: 3\n", r"bad\.yaml: not YAML: .*line 2"),
        ("name: 2001-99-99\n", r"bad\.yaml: not YAML"),
        ("\udcff\udcfe", r"bad\.yaml: not YAML"),  # not UTF-8
        ("base: nowhere.yaml\n", r"nowhere\.yaml: no such config here or in configs/"),
        ("base: [x]\n", r"bad\.yaml: base: \['x'\] is not allowed: it names another"),
        (f"base: {'x' * 999}\n", r"^x+: no such config here"),
        ("base: middle.yaml\n", r"^bad\.yaml: 'base' leads back to this file"),
        ("seed: 1\nname: x\nseed: 2\n", r"bad\.yaml: not YAML: the key 'seed' is there twice"),
        (
            "dataset: {class_map: {7: a, '7': b}}\n",
            r"bad\.yaml: not YAML: the key '7' is there twice",
        ),
        ("base: small.yaml\ndataset: {class_map: {2001-01-01: a}}\n", r"^bad\.yaml: .*class_map"),
        ("base: small.yaml\nseeds: 1\n", r"^bad\.yaml: unknown key 'seeds'; .* 'seed'"),
        ("name: x\ndataset: {kind: demo, root: d}\n", r"^bad\.yaml: key 'augment' is missing"),
        ("base: small.yaml\n1: 2\n", r"^bad\.yaml: unknown key '1'"),
        ("base: small.yaml\naugment: null\nsead: 1\n", r"^bad\.yaml: unknown key 'sead'"),
        ("name: x\ndatset: {kind: demo}\n", r"^bad\.yaml: unknown key 'datset'; .* 'dataset'"),
    ],
)
def test_bad_file_is_named(write, tmp_path, text, message):
    write("middle.yaml", base="bad.yaml")
    (tmp_path / "bad.yaml").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        read_config("bad.yaml")


def config_or_one_line(read, *arguments):
    try:
        answer = read(*arguments)
    except UserError as error:
        answer = str(error)
    assert isinstance(answer, Config) or len(answer.splitlines()) == 1


KEYS = st.sampled_from(["seed", "name", "augment.scale", "ohem", "dataset.classes", "model", "x.y"])


@given(st.one_of(st.text(), st.builds("{}={}".format, KEYS, st.text())))
def test_any_setting_gives_a_config_or_one_line(text):
    config_or_one_line(config_from, SMALL, "a checkpoint", [text])


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
SECTIONS = st.sampled_from([*Config.model_fields, "base", "nothing"])
FILES = st.one_of(st.text(), st.dictionaries(SECTIONS, VALUES).map(yaml.safe_dump))


@given(FILES)
def test_any_file_gives_a_config_or_one_line(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("config") / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    config_or_one_line(read_config, str(path))


def test_a_class_may_have_a_name_that_yaml_read_as_a_flag(tmp_path):
    words = ["dataset.classes=[no, on]", "dataset.class_map={0: no, 7: on}", "tensorboard=off"]
    config = read_config("demo.yaml", [*words, "pseudo_label.flip=yes", "dataset.kind=custom"])
    assert config.dataset.classes == ["no", "on"]
    assert config.dataset.class_map == {0: "no", 7: "on"}
    assert (config.tensorboard, config.pseudo_label.flip) == (False, True)
    (tmp_path / "kept.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert read_config(str(tmp_path / "kept.yaml")) == config
