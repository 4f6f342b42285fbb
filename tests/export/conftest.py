"""Says once, above the results, which versions of the runtimes were tested against (`-s` or not)."""

from importlib.metadata import PackageNotFoundError, version

import pytest

RUNTIMES = ("llama-cpp-python", "transformers", "torch", "accelerate", "gguf")


def versions() -> str:
    """From the packages' metadata: nothing is imported for it."""

    def one(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} not installed"

    return ", ".join(map(one, RUNTIMES))


@pytest.fixture(scope="session", autouse=True)
def print_versions(request):
    runtime = [
        i for i in request.session.items if i.get_closest_marker("llamacpp") or i.get_closest_marker("transformers")
    ]
    if runtime:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\nruntimes: {versions()}", flush=True)
