"""Which compiler flags end up in the environment, and when none do."""

import pytest

from crosslmm_jax.cli import app as cli
from crosslmm_jax.cli import params
from crosslmm_jax.errors import UserError
from crosslmm_jax.parallel import xla_flags

FLAGS = " ".join(xla_flags.FLAGS)


@pytest.fixture
def machine(monkeypatch):
    """`machine("libtpu", version="0.11.2")`: what is installed."""

    def install(*plugins: str, version: str = "0.11.2") -> None:
        monkeypatch.setattr(
            xla_flags.importlib.util, "find_spec", lambda name: object() if name in plugins else None
        )
        monkeypatch.setattr(xla_flags.importlib.metadata, "version", lambda name: version)

    return install


def added(**environ: str) -> dict[str, str]:
    """What `apply` changes in `environ`."""
    before = dict(environ)
    xla_flags.apply(environ)
    return {name: value for name, value in environ.items() if before.get(name) != value}


def test_tpu_flags_are_set_only_on_request(machine) -> None:
    machine("libtpu")
    assert added(CROSSLMM_XLA_FLAGS="all") == {"LIBTPU_INIT_ARGS": FLAGS}
    assert added(CROSSLMM_XLA_FLAGS="all", JAX_PLATFORMS="tpu,cpu") == {"LIBTPU_INIT_ARGS": FLAGS}
    assert added() == {}
    assert added(CROSSLMM_XLA_FLAGS="0") == {}
    with pytest.raises(UserError, match="CROSSLMM_XLA_FLAGS is 'yes'"):
        added(CROSSLMM_XLA_FLAGS="yes")


@pytest.mark.parametrize("plugin", ["jax_cuda13_plugin", "jax_cuda12_plugin"])
@pytest.mark.parametrize("switch", ["", "0", "all"])
def test_gpus_get_no_flags(machine, plugin: str, switch: str) -> None:
    """XLA_FLAGS hold for decoding too, which is three times as fast with Triton's matrix products."""
    machine(plugin)
    assert added(CROSSLMM_XLA_FLAGS=switch, XLA_FLAGS="--xla_a=1") == {}


def test_cpus_get_no_flags(machine) -> None:
    machine()
    assert added(CROSSLMM_XLA_FLAGS="all") == {}
    machine("libtpu")
    assert added(CROSSLMM_XLA_FLAGS="all", JAX_PLATFORMS="cpu") == {}


def test_flags_of_the_user_are_kept(machine) -> None:
    machine("libtpu")
    first, *others = xla_flags.FLAGS
    theirs = first.replace("true", "false")
    found = added(CROSSLMM_XLA_FLAGS="all", LIBTPU_INIT_ARGS=f"{theirs} --xla_a=1")
    assert found["LIBTPU_INIT_ARGS"].split() == [theirs, "--xla_a=1", *others]
    # A longer name with the same beginning is another flag.
    found = added(CROSSLMM_XLA_FLAGS="all", LIBTPU_INIT_ARGS=first.replace("=", "_any="))
    assert first in found["LIBTPU_INIT_ARGS"].split()
    assert added(CROSSLMM_XLA_FLAGS="all", LIBTPU_INIT_ARGS=FLAGS) == {}


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("0.10.1", False),
        ("0.10.2", True),
        ("0.11.2.dev1", True),
        ("0.12", False),
        ("0.12.0", False),
        ("", False),
    ],
)
def test_flags_are_set_only_for_known_versions(machine, version: str, known: bool) -> None:
    machine("libtpu", version=version)
    assert bool(added(CROSSLMM_XLA_FLAGS="all")) == known


def test_the_command_sets_them_before_its_room_runs(machine, monkeypatch) -> None:
    machine("libtpu")
    monkeypatch.setattr(cli.os, "environ", {"CROSSLMM_XLA_FLAGS": "all"})
    seen = {}
    monkeypatch.setattr(params, "_params", lambda args: seen.update(cli.os.environ))
    assert cli.main(["params", "--preset", "tiny"]) == 0
    assert seen["LIBTPU_INIT_ARGS"] == FLAGS


def test_shell_line(machine) -> None:
    machine("libtpu")
    environ = {"CROSSLMM_XLA_FLAGS": "all"}
    assert xla_flags.shell_line(environ) == f"export LIBTPU_INIT_ARGS='{FLAGS}'"
    assert xla_flags.shell_line(environ | {"LIBTPU_INIT_ARGS": FLAGS}) == ""
    assert xla_flags.shell_line({}) == ""
