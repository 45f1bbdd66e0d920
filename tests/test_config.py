import pytest

from dataset.catalog import describe
from dataset.query import QueryRule
from utils.config.reading import CONFIGS, config_from, read_config
from utils.errors import UserError

SMALL = {
    "name": "small",
    "dataset": {"kind": "demo", "root": "data"},
    "augment": {"base_size": 64, "crop_size": 48},
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config(path.name)
    QueryRule.of(config.query, describe(config.dataset))
    assert config == config_from(config.model_dump(mode="json"), "checkpoint")


def test_every_shipped_config_has_a_name_of_its_own():
    paths = sorted(CONFIGS.glob("*.yaml"))
    assert len({read_config(str(path)).name for path in paths}) == len(paths)


def test_cpu_recipe_changes_its_base_key_by_key():
    config = read_config("camvid_cpu.yaml")
    assert config.dataset == read_config("camvid.yaml").dataset
    assert config.augment.scale == (0.5, 2.0)
    assert config.augment.crop_size == 160
    assert config.model.name == "deeplabv3plus"
    assert (config.model.backbone, config.model.pretrained) == ("resnet18", None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=-1", r"seed: -1 is not allowed: .*greater than or equal to 0"),
        ("workers=two", r"workers: 'two' is not allowed: .*valid integer"),
        ("augment.crop_size=1.5", r"augment\.crop_size: 1\.5 is not allowed: .*integer"),
        ("precision=fp8", r"precision: 'fp8' is not allowed: .*'auto', 'fp32', 'bf16' or 'fp16'"),
        ("model.output_stride=4", r"model\.output_stride: 4 is not allowed: .*8, 16 or 32"),
        ("supervised.batch_size=1", r"supervised\.batch_size: 1 is not allowed: .*greater than 1"),
        ("augment.scale=[2, 1]", r"the smaller number comes first"),
        ("query.exclude=fish", r"query\.exclude: 'fish' is not allowed: .*list"),
        ("name=a/b", r"name: 'a/b' is not allowed"),
        ("cache=disk", r"cache: 'disk' is not allowed: .*'ram'"),
        ("dataset.ignore=[255, -1]", r"dataset\.ignore: -1 is not allowed: .*equal to 0"),
        ("dataset.class_map.70000=a", r"dataset\.class_map\.70000: .* from 0 to 65535; 'other'"),
        ("dataset.class_map={70000: a}", r"dataset\.class_map: 70000 is not allowed: ids in mask"),
        ("dataset.class_map={7: yes}", r"dataset\.class_map: True is not allowed: a class is its"),
    ],
)
def test_wrong_value_names_key_value_and_what_is_allowed(setting, message):
    with pytest.raises(UserError, match=f"^command line: .*{message}"):
        config_from(SMALL, "a checkpoint", [setting])


@pytest.mark.parametrize(
    "setting",
    [
        "pseudo_label.scales=[0]",
        "pseudo_label.scales=[-1.0]",
        "pseudo_label.scales=[.nan]",
        "augment.scale=[0.5, .inf]",
        "augment.strong.blur=[2.0, 0.1]",
        "augment.strong.blur=[-1.0, 2.0]",
        "optimizer.lr=.inf",
        "optimizer.head_multiple=.inf",
        "name=..",  # the run folder would be outdir's parent, whose stages --from-stage removes
        "name=.",
    ],
)
def test_value_that_would_fail_later_is_refused_now(setting):
    with pytest.raises(UserError, match="is not allowed"):
        config_from(SMALL, "a checkpoint", [setting])


@pytest.mark.parametrize("setting", ["model=3", "dataset=null", "ohem=yes", "augment=[1]"])
def test_value_for_a_section_is_refused_in_words_of_the_config(setting):
    with pytest.raises(UserError, match=r"^command line: ") as caught:
        config_from(SMALL, "a checkpoint", [setting])
    assert "Section" not in str(caught.value)  # a class of the program, no word of the config


def test_half_a_pair_is_not_called_a_missing_key():
    with pytest.raises(UserError, match=r"augment\.scale") as caught:
        config_from(SMALL, "a checkpoint", ["augment.scale=[1]"])
    assert "augment.scale.1" not in str(caught.value)


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


@pytest.mark.parametrize("accumulate", [3, 4])
def test_parts_of_a_batch_that_do_not_fit_are_refused(accumulate):
    words = ["retrain.batch_size=4", f"retrain.accumulate={accumulate}"]
    with pytest.raises(UserError, match="does not cut batch_size 4 into parts of one size"):
        config_from(SMALL, "a checkpoint", words)
    assert config_from(SMALL, "x", ["retrain.batch_size=4", "retrain.accumulate=2"])
