import torch

from utils.optimization import StepOutcome
from utils.outcomes import Outcomes


def outcome(loss, finite=True):
    return StepOutcome(torch.tensor(loss), torch.tensor(finite))


def test_each_step_is_looked_at_when_the_next_one_is_there():
    told = []
    outcomes = Outcomes(lambda *what: told.append(what))
    outcomes.add(0, 0, outcome(1.0))
    outcomes.add(0, 1, outcome(torch.inf, finite=False))
    outcomes.add(0, 2, outcome(0.5, finite=False))
    assert told == [(0, 1, torch.inf)]
    outcomes.settle()
    outcomes.settle()
    assert told[1:] == [(0, 2, 0.5)]
