#!/bin/sh
# make sanitize: the tests under gcc's sanitizers and a smoke test under valgrind.
#
#     tests/sanitize.sh python [address] [undefined] [thread] [valgrind]
#
# The interpreter is an ordinary one: a sanitizer's runtime is preloaded, and the
# module alone is instrumented (IOLOOP_SANITIZE, see setup.py), also that with the fake
# kqueue.  Left out are, everywhere, whatever builds or installs a module of its own
# (packaging, C API, examples, clients) and the slow tests; and further below,
# with the reason, what a sanitizer makes pointless or too slow.
#
# For `thread` the interpreter may also be a free-threaded one that is instrumented
# itself (CPython's configure --disable-gil --with-thread-sanitizer).  Only then does
# TSan see what the GIL would hide, and all that is about threads is tested there.
set -eu

python=$1
shift
[ $# -gt 0 ] || set -- address undefined thread valgrind
cd "$(dirname "$0")/.."
work=$PWD/build/sanitize

library() {
    gcc -print-file-name="$1.so"
}

files() {
    for name; do
        echo "tests/test_$name.py"
    done
}

# PYTHONMALLOC: small blocks come from malloc() too, where a sanitizer sees them.
run() {  # variables, command
    env PYTHONMALLOC=malloc PYTHONDONTWRITEBYTECODE=1 IOLOOP_TEST_TIMEOUT=300 "$@"
}

# Left out under TSan: tests that preload a library in place of the sanitizer's
# (check_and_the_poll, system_call, post_makes_room); those that don't allow it to hand
# on signals late or as one (no_action_kills, no_signal_interrupts, embedded_in_asyncio,
# handler_that_adds); those of children that go on with the loop (goes_on,
# forks_beside_busy), where it also knows no threads; the one that exchanges CPython's
# allocator while other threads use it (no_object_is_made); and the one that builds the
# example.  The handler of CPython's faulthandler changes errno, which it reports as well.
tsan_can="not check_and_the_poll and not system_call and not post_makes_room \
    and not no_object_is_made and not the_example \
    and not goes_on and not forks_beside_busy and not embedded_in_asyncio \
    and not no_signal_interrupts and not no_action_kills and not handler_that_adds \
    and not wakeup_fd_of_a_child and not blocks_in_c and not faulthandler_dumps"

is_instrumented() {
    "$python" -c 'import sys, sysconfig
sys.exit("-fsanitize=thread" not in sysconfig.get_config_var("CFLAGS"))'
}

# The reports go to files: pytest keeps what a test that passes has written.  A fork takes
# the locks of all loops, more than TSan can look at for deadlocks.  What TSan forgets of
# a thread's history can't be suppressed.
without_gil() {
    rm -f "$work"/race.*
    options=exitcode=66:die_after_fork=0:detect_deadlocks=0:history_size=7
    run env -u PYTHONMALLOC \
        TSAN_OPTIONS="$options:suppressions=$PWD/tests/tsan.supp:log_path=$work/race" \
        $pytest -m "not slow" \
        -k "$tsan_can and not kqueue and not gil_stays_off" \
        $(files cdoor fork freethreading signals storms stress threads watchdog) || {
        cat "$work"/race.*
        exit 1
    }
}

mkdir -p "$work"
pytest="$python -m pytest --quiet -o cache_dir=$work/cache"

for tool; do
    echo "== $tool"
    if [ "$tool" != valgrind ]; then
        export IOLOOP_SANITIZE="$tool" PYTHONPATH="$work/$tool"
        "$python" setup.py --quiet build_ext --build-lib "$work/$tool"
    fi
    case $tool in
    address)
        # random_order: looks at the process's memory, in which freed blocks stay.
        # The link order is that of test_faults.py, whose library comes before.
        # The guard against hanging is a thread, which each test starts.  It may hold a
        # lock of ASan's malloc() while the test forks, and the child waits for that.
        run LD_PRELOAD="$(library libasan) $(library libstdc++)" \
            ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 \
            IOLOOP_TEST_TIMEOUT=0 timeout 1800 $pytest -m "not slow" -k "not random_order" \
            $(files callbacks errors fork handlers impl kqueue memory model nomemory \
                periodic pollers run_sync signals start_stop stress faults threads \
                timeouts watchdog)
        ;;
    undefined)
        # What computes: no threads, no processes.
        run LD_PRELOAD="$(library libubsan)" UBSAN_OPTIONS=print_stacktrace=1 \
            $pytest -m "not slow" \
            $(files callbacks errors handlers impl kqueue model nomemory periodic \
                pollers run_sync faults timeouts)
        ;;
    thread)
        if is_instrumented; then
            without_gil
            continue
        fi
        # What is about threads.
        run LD_PRELOAD="$(library libtsan)" \
            TSAN_OPTIONS=exitcode=66:die_after_fork=0 \
            $pytest -m "not slow" \
            -k "$tsan_can" \
            $(files fork signals stress threads watchdog)
        ;;
    valgrind)
        # 30 times slower: every operation of leaks.py a few times, with the module
        # that is installed.
        unset IOLOOP_SANITIZE PYTHONPATH
        run valgrind --quiet --error-exitcode=99 --leak-check=no \
            --suppressions=tests/valgrind.supp "$python" tests/leaks.py --once
        ;;
    *)
        echo "unknown: $tool" >&2
        exit 2
        ;;
    esac
done
