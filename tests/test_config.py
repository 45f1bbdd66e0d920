import pytest

from dataset.catalog import describe
from dataset.query import QueryRule
from utils.config.reading import CONFIGS, METHODS, config_from, read_config
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
        QueryRule.of(config.query, describe(config.dataset))
        assert config == config_from(config.model_dump(mode="json"), "checkpoint")
    assert len({config.name for config in configs}) == len(configs)


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
        ("dataset.class_map={7: yes}", r"dataset\.class_map\.7: True is not allowed: a class is"),
        ("model=3", r"model: 3 is not allowed: a section holds 'key: value' lines"),
        ("dataset=null", r"dataset: None is not allowed: a section holds"),
        ("ohem=yes", r"ohem: True is not allowed: a section holds"),
        ("augment.scale=[1]", r"augment\.scale: .* is not allowed: more values are wanted"),
        ("retrain.accumulate=3", r"accumulate 3 does not cut batch_size 32 into parts of one size"),
        ("retrain.accumulate=32", r"accumulate 32 does not cut batch_size 32"),
    ],
)
def test_wrong_value_names_key_value_and_what_is_allowed(setting, message):
    with pytest.raises(UserError, match=f"^command line: .*{message}"):
        config_from(SMALL, "a checkpoint", [setting])


@pytest.mark.parametrize(
    "setting",
    [
        "pseudo_label.scales=[0]",
        "pseudo_label.scales=[.nan]",
        "augment.scale=[0.5, .inf]",
        "augment.strong.blur=[-1.0, 2.0]",
        "optimizer.lr=.inf",
        "name=..",  # the run folder would be outdir's parent, whose stages --from-stage removes
        "retrain.threshold_by_class=true",  # of no threshold
    ],
)
def test_value_that_would_fail_later_is_refused_now(setting):
    with pytest.raises(UserError, match="is not allowed"):
        config_from(SMALL, "a checkpoint", [setting])


def test_queries_need_stored_labels():
    words = ["stages=[1, 6]", "retrain.labels=average"]
    for setting in ("retrain.mix=queried", "retrain.learn_queried=true"):
        with pytest.raises(UserError, match="stages without 2 do not have"):
            config_from(SMALL, "a checkpoint", [*words, setting])


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
