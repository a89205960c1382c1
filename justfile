# The task queue. `just` alone lists these recipes.

set positional-arguments

python_deps := "--with 'persist-queue>=1.1,<2' --with 'watchdog>=4,<8'"
test_deps := python_deps + " --with 'pytest>=8,<10' --with 'pytest-timeout>=2.3,<3' --with 'prometheus-client>=0.20,<1' --with 'rich>=13,<16' --with 'selenium>=4.20,<5' --with 'pytest-xdist>=3.5,<4' --with 'pytest-rerunfailures>=14,<17'"

[private]
default:
    @just --list --unsorted

# Watch one hook payload become a task, a broken link, and a result (throw-away state)
demo:
    @uv run --script demo.py

# Run the tests: real processes, real SIGKILL, the real lychee; e.g. just test -k hook
test *args: warm
    uv run --no-project {{ test_deps }} python -m pytest -n 2 --dist loadfile tests "$@"

# Put a task into a queue: just enqueue notifications link_validation '{"workspace_path": "…"}'
enqueue *args:
    @uv run --script enqueue.py "$@"

# Run tasks: just work notifications --then completions
work *args:
    @uv run --script worker.py "$@"

# See and act: just tasks stats, just tasks list, just tasks retry ID
tasks *args:
    @uv run --script tasks.py "$@"

# What is wrong, in plain words
doctor *args:
    @uv run --script tasks.py doctor "$@"

# Prune the history, the logs and dead owners' locks
cleanup *args:
    @uv run --script cleanup.py "$@"

# A web page on the live database, loopback only
dashboard *args:
    @uv run --script dashboard.py "$@"

# Fill uv's cache, so that no hook ever downloads
warm:
    #!/bin/sh
    set -eu
    for script in enqueue.py worker.py cleanup.py tasks.py dashboard.py install.py demo.py handlers/*; do
        if grep -qs '^# /// script' "$script"; then uv sync --quiet --script "$script"; fi
    done

# Copy the scripts into ~/.claude/automation/lychee (or PREFIX) and offer the hook
install *args:
    @uv run --script install.py install "$@"

# Take out exactly what install put in; never the state
uninstall *args:
    @uv run --script install.py uninstall "$@"

# Write the units that start a worker when there is work (--enable loads them)
service *args:
    @uv run --script install.py service "$@"

# N workers, a killer, and the proof that nothing was lost: just soak 300
soak seconds="60":
    uv run --no-project {{ python_deps }} python bench/soak.py {{ seconds }}

# Measure: throughput, claim cost, recovery, hook start-up
bench name *args:
    uv run --no-project {{ python_deps }} python bench/{{ name }}.py {{ args }}

# What ruff has to say
lint:
    uvx 'ruff>=0.8,<1' check .
