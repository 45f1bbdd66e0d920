import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from utils.config.reading import config_from, read_config
from utils.config.schema import Config
from utils.errors import UserError

SMALL = {
    "name": "small",
    "dataset": {"kind": "demo", "root": "data"},
    "augment": {"base_size": 64, "crop_size": 48},
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a YAML file into the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(file, /, **values):
        (tmp_path / file).write_text(yaml.safe_dump(values))

    write("small.yaml", **SMALL)
    return write


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
    with pytest.raises(UserError) as caught:
        read_config("small.yaml", [f"{wrong}=1"])
    assert str(caught.value) == (
        f"command line: unknown key '{wrong}'; the nearest known key is '{nearest}'"
    )


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
        ("model=&a [*a]", "model: .* a section holds 'key: value' lines"),
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


KEYS = st.sampled_from(["seed", "name", "augment.scale", "ohem", "dataset.classes", "model", "x.y"])


@given(st.one_of(st.text(), st.builds("{}={}".format, KEYS, st.text())))
def test_any_setting_gives_a_config_or_one_line(text):
    try:
        answer = config_from(SMALL, "a checkpoint", [text])
    except UserError as error:
        answer = str(error)
    assert isinstance(answer, Config) or len(answer.splitlines()) == 1


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
SECTIONS = st.sampled_from([*Config.model_fields, "base", "nothing"])
FILES = st.one_of(st.text(), st.dictionaries(SECTIONS, VALUES).map(yaml.safe_dump))


@given(FILES)
def test_any_file_gives_a_config_or_one_line(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("config") / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        answer = read_config(str(path))
    except UserError as error:
        answer = str(error)
    assert isinstance(answer, Config) or len(answer.splitlines()) == 1
