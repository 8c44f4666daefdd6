#!/bin/sh
# make sanitize: the tests under gcc's sanitizers and a smoke test under valgrind.
#
#     tests/sanitize.sh python [address] [undefined] [thread] [valgrind]
#
# The interpreter is an ordinary one: a sanitizer's runtime is preloaded, and the
# module alone is instrumented.  It is built under build/sanitize/, once for each.
# Left out are, everywhere, the kqueue poller (conftest.py builds that module, and
# without a sanitizer), whatever builds or installs a module of its own (packaging,
# C-level door, examples, clients) and the slow tests; and further below, with the
# reason, what a sanitizer makes pointless or too slow.
set -eu

python=$1
shift
[ $# -gt 0 ] || set -- address undefined thread valgrind
cd "$(dirname "$0")/.."
work=$PWD/build/sanitize

config() {
    "$python" -c "import sysconfig as s; print($1)"
}

build() {  # name, flags
    mkdir -p "$work/$1"
    target=$work/$1/ioloop$(config 's.get_config_var("EXT_SUFFIX")')
    shift
    gcc -shared -fPIC -g -O1 -fno-omit-frame-pointer -fvisibility=hidden -w "$@" \
        -I"$(config 's.get_path("include")')" "$work/ioloop.c" -o "$target"
}

library() {
    gcc -print-file-name="$1.so"
}

files() {
    for name; do
        echo "tests/test_$name.py"
    done
}

# PYTHONMALLOC: small blocks come from malloc() too, where a sanitizer sees them.
run() {  # name, variables, command
    echo "== $1"
    PYTHONPATH=$work/$1
    export PYTHONPATH
    shift
    env PYTHONMALLOC=malloc PYTHONDONTWRITEBYTECODE=1 IOLOOP_TEST_TIMEOUT=300 "$@"
}

mkdir -p "$work"
"$python" -m cython -o "$work/ioloop.c" ioloop.pyx
pytest="$python -m pytest --quiet -o cache_dir=$work/cache"

for tool; do
    case $tool in
    address)
        build address -fsanitize=address
        # random_order: looks at the process's memory, in which freed blocks stay.
        # The link order is that of test_faults.py, whose library comes before.
        run address \
            LD_PRELOAD="$(library libasan) $(library libstdc++)" \
            ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 \
            $pytest -m "not slow" -k "not kqueue and not random_order" \
            $(files callbacks errors fork handlers impl memory model nomemory \
                periodic pollers run_sync signals start_stop stress faults threads \
                timeouts watchdog)
        ;;
    undefined)
        build undefined -fsanitize=undefined -fno-sanitize-recover=undefined
        # What computes: no threads, no processes.
        run undefined \
            LD_PRELOAD="$(library libubsan)" UBSAN_OPTIONS=print_stacktrace=1 \
            $pytest -m "not slow" -k "not kqueue" \
            $(files callbacks errors handlers impl model nomemory periodic pollers \
                run_sync faults timeouts)
        ;;
    thread)
        # What is about threads.  E1 and system_call preload a library in place of the
        # sanitizer's, and it hands on signals late, which E20 doesn't allow; nor those
        # children that go on with the loop (goes_on), where it also knows no threads.
        # -Wno-tsan: it knows no fences.  They order `asleep` against the queue, both
        # of which are atomics, so that it takes no race for one that is none.
        # The handler of CPython's faulthandler changes errno, which it reports as well.
        build thread -fsanitize=thread -Wno-tsan
        run thread \
            LD_PRELOAD="$(library libtsan)" \
            TSAN_OPTIONS=exitcode=66:die_after_fork=0 \
            $pytest -m "not slow" \
            -k "not kqueue and not E1_ and not E20 and not system_call and not goes_on \
               and not no_signal_interrupts and not no_action_kills \
               and not wakeup_fd_of_a_child and not blocks_in_c \
               and not faulthandler_dumps" \
            $(files fork signals stress threads watchdog)
        ;;
    valgrind)
        # 30 times slower: every operation of leaks.py a few times.
        build valgrind
        run valgrind valgrind --quiet --error-exitcode=99 --leak-check=no \
            --suppressions=tests/valgrind.supp "$python" tests/leaks.py --once
        ;;
    *)
        echo "unknown: $tool" >&2
        exit 2
        ;;
    esac
done
