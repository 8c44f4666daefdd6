#!/bin/sh
# make platforms: the suite on platforms that this machine is not.
#
#     tests/platforms.sh python [i386] [arm64] [s390x] [musl]
#
# The first three are Debian in a chroot; qemu emulates arm64 and s390x.  musl and a
# CPython for it are built from Debian's sources.  PYTEST_ADDOPTS chooses tests:
#
#     PYTEST_ADDOPTS=tests/test_threads.py make platforms ARGS=s390x
#
# It needs root, and a Debian machine, whose apt and pip know where to get things.
# All of it is kept in build/platforms; mounts and the registration with the kernel
# vanish with the script.  The exit status is 1 if any platform failed or can't be had.
set -eu

python=$1
shift
cd "$(dirname "$0")/.."

if [ $# -ne 1 ]; then
    failed=
    [ $# -gt 0 ] || set -- i386 arm64 s390x musl
    for platform; do
        tests/platforms.sh "$python" "$platform" || failed="$failed $platform"
    done
    [ -z "$failed" ] || echo "platforms: failed:$failed" >&2
    [ -z "$failed" ]
    exit
fi

platform=$1
root=$PWD/build/platforms/$platform
echo "== $platform"

give_up() {
    echo "platforms: $platform can't be had here: $*" >&2
    exit 1
}

need() {  # command, its package
    command -v "$1" >/dev/null || give_up "apt install $2"
}

[ "$(id -u)" = 0 ] || give_up "you are not root"
mirror=$(apt-get indextargets --format '$(SITE)' "Label: Debian" | head -n 1)
[ -n "$mirror" ] || give_up "apt knows no mirror of Debian (apt-get update?)"
keys=/usr/share/keyrings/debian-archive-keyring.gpg

copy_sources() {  # to
    rm -rf "$1"
    mkdir -p "$1"
    git ls-files -z --cached --others --exclude-standard |
        tar --create --null --files-from - | tar --extract --directory "$1"
}

# -- Debian ----------------------------------------------------------------------

debian() {  # options of debootstrap
    need debootstrap debootstrap
    rm -rf "$root"
    debootstrap --variant=minbase --keyring="$keys" "$@" \
        --include=ca-certificates,gcc,libc6-dev,make,python3-dev,python3-venv \
        bookworm "$root" "$mirror"
}

# Where the network is, for pip.
configure() {
    cp /etc/resolv.conf "$root/etc"
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs"
    [ ! -e /etc/pip.conf ] || cp /etc/pip.conf "$root/etc"
    touch "$root/ready"
}

# Run a command in the chroot, as all that it sees: with processes, mounts and devices
# of its own.  The variable `container` keeps debootstrap from making devices.
inside() {  # command
    $outside unshare --mount --pid --fork --kill-child --mount-proc="$root/proc" \
        sh -ec '
            root=$1 format=$2
            shift 2
            mount --rbind /dev "$root/dev"
            if [ -n "$format" ]; then
                mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
                cat "$format" >/proc/sys/fs/binfmt_misc/register
            fi
            exec chroot "$root" env -i container=lxc HOME=/root PATH="$PATH" "$@"
        ' sh "$root" "$format" "$@"
}

test_inside() {  # command that the tests run under
    copy_sources "$root/ioloop"
    inside "$@" IOLOOP_TEST_TIMEOUT=600 PYTEST_ADDOPTS="${PYTEST_ADDOPTS-}" \
        make --directory /ioloop test VENV=/venv
}

# The kernel runs another machine's programs by qemu if they are registered.  A user
# namespace has registrations of its own; a process that ends with this one keeps it.
emulate() {  # qemu's name of the machine
    need "qemu-$1-static" qemu-user-static
    format=/usr/lib/binfmt.d/qemu-$1.conf
    unshare --user true || give_up "there are no user namespaces"
    unshare --user setpriv --pdeathsig KILL sleep infinity &
    keeper=$!
    until echo 0 0 65536 >"/proc/$keeper/uid_map"; do :; done 2>/dev/null
    echo 0 0 65536 >"/proc/$keeper/gid_map"
    outside="nsenter --user --target $keeper"
    $outside unshare --mount mount -t binfmt_misc none /proc/sys/fs/binfmt_misc ||
        give_up "a user namespace has no binfmt_misc before Linux 6.7"
    if [ ! -e "$root/ready" ]; then
        debian --foreign --arch="$platform"
        inside /debootstrap/debootstrap --second-stage
        configure
    fi
    # It measures how late the loop is, which is slow here.
    late=tests/test_timeouts.py::test_lateness_is_microseconds
    PYTEST_ADDOPTS="--deselect $late ${PYTEST_ADDOPTS-}"
    test_inside env
}

# -- musl ------------------------------------------------------------------------

fetch_sources() {  # to, packages
    mkdir -p "$1/lists/partial"
    for release in trixie bookworm; do
        echo "deb-src [signed-by=$keys] $mirror $release main"
    done >"$1/sources.list"
    (
        cd "$1"
        shift
        get="apt-get --quiet -o Dir::Etc::sourcelist=$PWD/sources.list
            -o Dir::Etc::sourceparts=- -o Dir::State::lists=$PWD/lists
            -o APT::Sandbox::User=root"
        $get update
        $get source --download-only "$@"
        for archive in *.orig.tar.*z *.orig.tar.bz2; do
            tar --extract --file "$archive"
        done
    )
}

build_musl() (
    rm -rf "$root"
    fetch_sources "$root/source" python3.13 musl libffi/bookworm zlib/bookworm
    (
        cd "$root"/source/musl-*
        ./configure --prefix="$root" --syslibdir="$root/lib"
        make -j "$(nproc)" install
    )
    # The kernel's headers are the same for every C library.
    ln -s /usr/include/linux /usr/include/asm-generic \
        "/usr/include/$(uname -m)-linux-gnu/asm" "$root/include"
    export CC="$root/bin/musl-gcc" CFLAGS="-O2 -fPIC"
    (
        cd "$root"/source/zlib-*
        ./configure --static --prefix="$root"
        make install
    )
    (
        cd "$root"/source/libffi-*
        ./configure --quiet --prefix="$root" --disable-shared \
            --disable-exec-static-tramp
        make install
    )
    (
        cd "$root"/source/Python-*
        export PKG_CONFIG_LIBDIR="$root/lib/pkgconfig"
        # It is still gcc, and would name glibc as its C library.
        sed -i s/--print-multiarch/--no-multiarch/ configure
        ./configure --quiet --prefix="$root" --with-ensurepip=install
        make -j "$(nproc)" install
    )
    touch "$root/ready"
)

# --------------------------------------------------------------------------------

outside=""
format=""
case $platform in
i386)
    if [ ! -e "$root/ready" ]; then
        debian --arch=i386
        configure
    fi
    test_inside setarch i686 env
    ;;
arm64) emulate aarch64 ;;
s390x) emulate s390x ;;
musl)
    [ -e "$root/ready" ] || build_musl
    # Its pip has no TLS, so this machine's gets what it installs.
    "$python" -m pip --quiet download --only-binary :all: --python-version 3.13 \
        --platform musllinux_1_2_x86_64 --platform musllinux_1_1_x86_64 \
        --dest "$root/wheels" "pip>=25.1" --group test
    copy_sources "$root/ioloop"
    PIP_NO_INDEX=1 PIP_FIND_LINKS="$root/wheels" \
        make --directory "$root/ioloop" test ARGS="" \
        PYTHON="$root/bin/python3" VENV="$root/venv"
    ;;
*) give_up "the script does not know it" ;;
esac
