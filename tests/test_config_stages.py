"""The table of which stages read which settings."""

from collections import defaultdict

import pytest

import train as train_program
from utils.config.reading import _keys, read_config
from utils.config.schema import Config, Section
from utils.config.stages import HOW, READERS, readers, saves_memory
from utils.run.stages import Run

KEYS = sorted(_keys(Config))
# Stages that look at a setting and make the same of every value.
WITHOUT_EFFECT = {
    ("retrain.average_decay", 1),  # there is no running average
    *(("select.score", stage) for stage in (4, 6)),  # stage 1 alone keeps earlier networks
    *(("pseudo_label.neighbours", stage) for stage in (4, 6)),  # panels draw them
}


@pytest.mark.parametrize("key", KEYS)
def test_the_table_knows_every_key(key):
    assert set(readers(key)) <= {1, 2, 3, 4, 5, 6}


def test_the_table_knows_no_other_key():
    assert set(READERS) <= set(KEYS)
    assert set(HOW) <= set(KEYS)
    assert saves_memory("inference.window.size")
    assert not saves_memory("inference.long_side")
    with pytest.raises(KeyError, match=r"sections\.key: add to READERS in utils/config/stages\.py"):
        readers("sections.key")


@pytest.mark.exhaustive
def test_stages_read_what_the_table_says(monkeypatch, demo_overrides):
    """Six stages, of which every reading of a setting is noted."""
    paths = {type(Config.model_fields[name].default): name for name in Config.model_fields}
    dataset, augment = (Config.model_fields[name].annotation for name in ("dataset", "augment"))
    paths |= {dataset: "dataset", augment: "augment", type(None): None}
    paths |= {augment.model_fields["strong"].annotation: "augment.strong", Config: ""}
    now, read = [], defaultdict(set)

    def noted(section, name):
        kind = object.__getattribute__(section, "__class__")
        if now and name in kind.model_fields and kind in paths:
            read[".".join(filter(None, (paths[kind], name)))].add(now[-1])
        return original(section, name)

    def working(run, name, *arguments):
        now.append(int(name[0]))
        work(run, name, *arguments)
        now.pop()

    original, work = Section.__getattribute__, Run._work
    monkeypatch.setattr(Section, "__getattribute__", noted, raising=False)
    monkeypatch.setattr(Run, "_work", working)
    settings = [*demo_overrides, "ohem={min_kept: 100}", "select.score=stability"]
    train_program.train(read_config("demo.yaml", settings))
    monkeypatch.undo()
    leaves = {key for key in read if not any(other.startswith(f"{key}.") for other in KEYS)}
    assert len(leaves) > 50
    told = {(key, n) for key in leaves if readers(key) for n in read[key] - set(readers(key))}
    assert told - WITHOUT_EFFECT == set()
