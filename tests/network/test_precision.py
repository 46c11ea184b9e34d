"""Products without TF32, whatever the user allows; in processes of their own, for the settings are the process's."""

import subprocess
import sys

import pytest

PROGRAM = """
import warnings, torch
warnings.simplefilter("error")
from nac_gpu.network.precision import without_tf32
backends = torch.backends
new = hasattr(backends.cuda.matmul, "fp32_precision")
owners = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.cudnn, backends) if new else ()
def read(setting):
    try:
        return setting()
    except RuntimeError:
        return "cannot be read"  # the older form of what was set by the newer one
def settings():
    older = (lambda: backends.cudnn.allow_tf32, lambda: backends.cuda.matmul.allow_tf32)
    found = [read(setting) for setting in (*older, torch.get_float32_matmul_precision)]
    return found + [owner.fp32_precision for owner in owners]
SET
before = settings()
try:
    with without_tf32():
        within = settings()
        raise KeyError
except KeyError:
    pass
assert settings() == before, (settings(), before)
assert within[0] in (False, "cannot be read"), within
assert within[1] in (False, "cannot be read"), within
assert "tf32" not in within[3:6], within
"""


@pytest.mark.parametrize(
    "setting",
    [
        "pass",
        "torch.set_float32_matmul_precision('medium')",
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.cudnn.allow_tf32 = False",
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
    ],
)
def test_settings_are_put_back(setting):
    code = PROGRAM.replace("SET", setting)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr


def test_outputs_that_are_compared_are_made_without_tf32():
    import torch

    from nac_gpu.network.comparing import outputs

    seen = []

    class Looks(torch.nn.Linear):
        def forward(self, x):
            seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
            return super().forward(x)

    before = torch.backends.cudnn.allow_tf32
    outputs(Looks(3, 2), torch.ones(1, 3))
    assert seen == [(False, "highest")]
    assert torch.backends.cudnn.allow_tf32 == before
