"""Compiled programs on disk: where they are kept, what a user's settings change, and that they are used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from crosslmm_jax.parallel import compilation_cache

# Counts what jax's cache found and did not find.
PROCESS = """
import collections, json, sys
from crosslmm_jax import load
import jax, jax.numpy as jnp
assert load.__name__ == "load"
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: seen.update([name]))
x = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones((8, 8)))
x = jax.jit(lambda x: x.sum())(x).block_until_ready()
print(json.dumps({name.rpartition("/")[2]: count for name, count in seen.items()}))
"""


def applied(**environ: str) -> dict[str, str]:
    """What `apply` adds to `environ`, or changes in it."""
    before = dict(environ)
    compilation_cache.apply(environ)
    return {name: value for name, value in environ.items() if before.get(name) != value}


def test_the_folder_is_below_the_users_cache_and_bounded(tmp_path) -> None:
    found = applied(XDG_CACHE_HOME=str(tmp_path))
    folder = tmp_path / "crosslmm_jax" / "programs"
    assert found == {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(compilation_cache.MAX_BYTES),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.0",
    }
    assert folder.stat().st_mode & 0o777 == 0o700, "jax runs what it finds there"


def test_without_xdg_it_is_below_the_home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = str(tmp_path / ".cache" / "crosslmm_jax" / "programs")
    assert applied()["JAX_COMPILATION_CACHE_DIR"] == folder
    assert applied(XDG_CACHE_HOME="relative")["JAX_COMPILATION_CACHE_DIR"] == folder


@pytest.mark.parametrize(
    "theirs",
    [
        {"JAX_COMPILATION_CACHE_DIR": "/elsewhere"},
        {"JAX_COMPILATION_CACHE_DIR": ""},
        {"JAX_ENABLE_COMPILATION_CACHE": "0"},
        {"JAX_ENABLE_COMPILATION_CACHE": "False"},
    ],
    ids=str,
)
def test_the_users_folder_and_switch_are_kept(tmp_path, theirs) -> None:
    assert applied(XDG_CACHE_HOME=str(tmp_path), **theirs) == {}
    assert not list(tmp_path.iterdir())


def test_single_settings_of_the_user_are_kept(tmp_path) -> None:
    theirs = {"JAX_COMPILATION_CACHE_MAX_SIZE": "-1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "3"}
    assert set(applied(XDG_CACHE_HOME=str(tmp_path), **theirs)) == {"JAX_COMPILATION_CACHE_DIR"}


def test_a_folder_that_cannot_be_used_is_a_warning(tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "crosslmm_jax").write_text("in the way")
    assert applied(XDG_CACHE_HOME=str(tmp_path)) == {}
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    assert applied(XDG_CACHE_HOME=str(tmp_path / "other")) == {}
    first, second = (record.getMessage() for record in caplog.records)
    assert str(tmp_path / "crosslmm_jax" / "programs") in first and "set XDG_CACHE_HOME" in first
    assert "belongs to another user" in second


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """A process whose user has set nothing, and whose jax has started."""
    for name in (compilation_cache.FOLDER, compilation_cache.SWITCH, *compilation_cache.SETTINGS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = [name.lower() for name in (compilation_cache.FOLDER, *compilation_cache.SETTINGS)]
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    for name, (default, _) in compilation_cache.SETTINGS.items():
        jax.config.update(name.lower(), default)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_running_jax_is_configured_unless_its_user_did(unset, tmp_path) -> None:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3.0)
    compilation_cache.use()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "crosslmm_jax" / "programs")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 3.0
    assert jax.config.jax_compilation_cache_max_size == compilation_cache.MAX_BYTES
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    compilation_cache.use()
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"


def test_torn_and_surplus_entries_are_removed(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "crosslmm_jax" / "programs"
    tuned = folder / "xla_gpu_per_fusion_autotune_cache_dir"
    tuned.mkdir(parents=True)
    monkeypatch.setattr(compilation_cache, "MAX_PROGRAMS", 4)
    monkeypatch.setattr(compilation_cache, "MAX_AUTOTUNED", 2)
    for number in range(5):
        for path in (folder / f"{number}-cache", folder / f"{number}-atime", tuned / f"{number}.textproto"):
            path.write_bytes(b"x")
            os.utime(path, (number, number))
    (folder / "killed-cache").write_bytes(b"half")
    (folder / "evicted-atime").write_bytes(b"x")
    applied(XDG_CACHE_HOME=str(tmp_path))
    kept = {path.name for path in folder.iterdir() if path.is_file()} - {".lockfile"}
    assert kept == {"3-cache", "3-atime", "4-cache", "4-atime"}
    assert [path.name for path in tuned.iterdir()] == ["4.textproto"]


@pytest.mark.slow
def test_a_new_process_compiles_nothing_that_others_have_compiled(tmp_path, one_device_flags) -> None:
    environ = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    environ |= {"XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": one_device_flags}

    def begin() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", PROCESS], env=environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def found(process: subprocess.Popen) -> dict[str, int]:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0 and not err, err
        return json.loads(out)

    at_once = [begin(), begin()]
    first = [found(process) for process in at_once]
    assert max(counts.get("cache_misses", 0) for counts in first) >= 2
    programs = list(Path(tmp_path, "crosslmm_jax", "programs").glob("*-cache"))
    later = found(begin())
    assert later.get("cache_misses", 0) == 0 and later["cache_hits"] >= 2
    assert list(Path(tmp_path, "crosslmm_jax", "programs").glob("*-cache")) == programs
