"""Every example does what its README says; two are run as it says, for the others the server has torch loaded."""

import re
import struct
from pathlib import Path

import launcher
import pytest
from multirank_plugin import asked_backend

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.timeout(300)

SMALL = {
    "rref": (3, r"after another rank's 50: 151"),
    "batching_server": (4, r"300 requests in 100 batches"),
    "pipeline": (3, r"step  40  loss 0\.0"),
    "torchscript": (2, r"32\., 32\., 32\."),
    "gpu_parameter_server": (3, r"trainer2 on .*: step 200  loss 0\.0"),
    "gpu_pipeline": (2, r"step  40  loss 0\.0"),
}


@pytest.fixture(autouse=True)
def _only_for_mpi(pytestconfig: pytest.Config) -> None:
    if asked_backend(pytestconfig) not in (None, "mpi"):
        pytest.skip("the examples are about this backend")


def run(arguments: list[str], size: int, start: bool = True) -> tuple[int | None, str]:
    return launcher.run_script([str(EXAMPLES / arguments[0]), *arguments[1:]], size, limit=240, launcher=start)


@pytest.mark.mpi
def test_hello() -> None:
    """As its README says, in processes of its own."""
    status, output = run(["hello.py"], 4)
    assert status == 0, output
    assert "hello worker3, this is worker0" in output, output


@pytest.mark.parametrize("name", SMALL)
def test_small_example(name: str) -> None:
    size, expected = SMALL[name]
    status, output = launcher.run_forked_script([str(EXAMPLES / f"{name}.py")], size, limit=240)
    assert status == 0, output
    assert re.search(expected, output), output


def test_no_example_is_forgotten() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*SMALL, "hello", "digits_parameter_server"}
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"examples/{name}.py" in readme for name in names)


@pytest.mark.parametrize("transport", ["mpi", "tensorpipe"])
def test_digits(transport: str, tmp_path: Path) -> None:
    for module in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(module, reason="of the extra [demo]")
    picture = tmp_path / "digits.png"
    arguments = ["digits_parameter_server.py", "--backend", transport, "--output", str(picture)]
    status, output = run(arguments, 4, start=transport == "mpi")
    assert status == 0, output
    accuracy = re.search(r"test accuracy  ([\d.]+)", output)
    assert accuracy, output
    assert float(accuracy[1]) >= 0.95
    assert re.search(r"calls .* [1-9]\d* per second", output), output
    assert re.search(r"tensor bytes .* MB per second", output), output
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:])
    assert width > 500
    assert height > 200


def test_digits_fails_when_it_has_not_learnt(tmp_path: Path) -> None:
    for module in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(module, reason="of the extra [demo]")
    status, output = run(["digits_parameter_server.py", "--epochs", "1", "--output", str(tmp_path / "x.png")], 4)
    assert status not in (0, None), output
    assert "test accuracy" in output
