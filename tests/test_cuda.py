"""The scripts on a GPU, which the other tests do not use: CUDA_VISIBLE_DEVICES=0 python -m pytest
tests/test_cuda.py"""

import importlib

import pytest
import torch
from conftest import Q_SCRIPTS, only_run, small
from games import Catch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("name", ["paac", "paac_atari", *Q_SCRIPTS])
def test_graphs_compute_what_single_launches_do(name, monkeypatch, tmp_path):
    """Trained with recorded passes and without: the same parameters, bit for bit."""
    script, recorded = importlib.import_module(name), []
    make_graphed_callables = torch.cuda.make_graphed_callables

    def parameters(folder):
        folder.mkdir()
        monkeypatch.chdir(folder)
        script.train(
            script.parse_args([*small(script), "--num-workers", "0", "--total-timesteps", "2000"]),
            script.make_env if name == "paac" else Catch,
        )
        return torch.load(only_run(folder) / "checkpoint.pt", weights_only=True)["agent"]

    monkeypatch.setattr(
        torch.cuda,
        "make_graphed_callables",
        lambda *args: recorded.append(1) or make_graphed_callables(*args),
    )
    graphs = parameters(tmp_path / "graphs")
    assert recorded
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda callables, samples: callables)
    plain = parameters(tmp_path / "plain")
    for parameter in graphs:
        assert torch.equal(graphs[parameter], plain[parameter]), parameter
