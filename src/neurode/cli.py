"""`neurode ...`: the studies, and what the library knows about itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

MISSING = "`neurode {name}` needs {package}, which is not installed. Type: pip install 'neurode[study]'"


def spirals(arguments: Sequence[str]) -> int:
    """Train the spiral classifiers and write the report."""
    import tyro

    from neurode._errors import InputError
    from neurode.studies.spirals import Settings, run
    from neurode.studies.spirals.train import Interrupted

    settings = tyro.cli(Settings, prog="neurode spirals", args=list(arguments))
    try:
        run(settings)
    except Interrupted as stopped:
        print(f"\nstopped: {stopped}. The state is saved; the same command goes on from there.")
        return 130
    except InputError as error:
        print(f"neurode spirals: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped while measuring. The trained models are saved; the same command measures again.")
        return 130
    return 0


def methods(arguments: Sequence[str]) -> int:
    """List the numerical methods: order, stages, evaluations, dense order."""
    from neurode.methods import format_table

    if arguments:
        print("neurode methods takes no arguments.", file=sys.stderr)
        return 2
    print(format_table())
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """Say what this machine gives neurode, and what to type for what it lacks."""
    import neurode

    if arguments:
        print("neurode doctor takes no arguments.", file=sys.stderr)
        return 2
    print(neurode.doctor())
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"spirals": spirals, "methods": methods, "doctor": doctor}


def usage() -> str:
    """What there is to type."""
    lines = [f"  neurode {name:<10} {function.__doc__}" for name, function in COMMANDS.items()]
    return "\n".join(["usage: neurode COMMAND [options]", "", *lines, "", "neurode COMMAND --help says more."])


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point of the `neurode` command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        import neurode

        print(neurode.__version__)
        return 0
    if name not in COMMANDS:
        from neurode._errors import did_you_mean

        print(f"neurode has no command {name!r}.{did_you_mean(name, COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name](rest)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("neurode"):
            raise
        print(MISSING.format(name=name, package=error.name), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
