"""A step leaves torch: exported to ONNX, and run there."""

import warnings

import pytest
import torch

from kizzasi.models import BlockSpec, ModelSpec, Signal, Tokens, build_model
from kizzasi.models.export import StepModule
from kizzasi.models.mixers import MambaSpec

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("stem", [Tokens(23), Signal(2, 3)], ids=["tokens", "signal"])
def test_a_mamba_step_in_onnxruntime_gives_the_same_logits(stem, tmp_path):
    model = build_model(ModelSpec(16, (BlockSpec(MambaSpec(d_state=4)),) * 2, stem), seed=1)
    step = StepModule(model, batch_size=2)
    frames = torch.randn(5, 2, 2) if isinstance(stem, Signal) else torch.arange(10).view(5, 2)
    names = step.state_names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            step,
            (frames[0], *step.flat()),
            tmp_path / "step.onnx",
            dynamo=True,
            verbose=False,
            input_names=["inputs", *names],
            output_names=["logits", *(f"{name}.after" for name in names)],
        )
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx")
    wanted = {given.name for given in session.get_inputs()}
    state = [leaf.numpy() for leaf in step.flat()]
    expected = model.init_state(2)
    for frame in frames:
        given = dict(zip(["inputs", *names], [frame.numpy(), *state], strict=True))
        logits, *state = session.run(None, {k: v for k, v in given.items() if k in wanted})
        out = model.step(frame, expected)
        expected = out.state
        torch.testing.assert_close(
            torch.from_numpy(logits), out.logits.detach(), rtol=1e-5, atol=1e-5
        )
