#!/bin/sh
# Unpacks the newest HAProxy and nginx of Debian unstable below .tools/peers, with
# the libraries that they need. Nothing is installed: both run with the loader that
# came with them, by .tools/peers/bin/haproxy and .tools/peers/bin/nginx. Does
# nothing when both are there.
#
#   integration/bench/peers.sh            unpack what is missing
#   integration/bench/peers.sh --check    only say what is missing; status 1 if anything is
#   integration/bench/peers.sh --renew    unpack the newest again
#
# Needs apt-get and dpkg-deb, network, and no root. Packages are verified by the keys
# of debian-archive-keyring.
set -eu

usage() {
	sed -n '2,12s/^# \{0,1\}//p' "$0"
}

mirror=${RESEAL_DEBIAN_MIRROR:-http://deb.debian.org/debian}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
programs='haproxy nginx'

case ${1:-} in
'' | --check | --renew) ;;
-h | --help)
	usage
	exit 0
	;;
*)
	usage >&2
	exit 2
	;;
esac

cd "$(dirname "$0")/../.."
mkdir -p .tools
home=$(cd .tools && pwd -P)/peers

missing=
for program in $programs; do
	"$home/bin/$program" -v >/dev/null 2>&1 || missing="$missing $program"
done
[ "${1:-}" = --renew ] && missing=" $programs"
if [ -z "$missing" ]; then
	echo "peers: nothing to unpack"
	exit 0
fi
if [ "${1:-}" = --check ]; then
	echo "peers: missing:$missing; run integration/bench/peers.sh" >&2
	exit 1
fi

fail() {
	echo "peers: $*" >&2
	exit 1
}
for command in apt-get dpkg-deb; do
	command -v "$command" >/dev/null 2>&1 || fail "$command is needed, and there is none: use Debian, or do without the newest peers"
done
[ -r "$keyring" ] || fail "$keyring is needed: install debian-archive-keyring"

# A world of apt's own, in which nothing is installed yet.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
chmod 755 "$work" # for the user that apt downloads as
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
: >"$work/status"
echo "deb [signed-by=$keyring] $mirror unstable main" >"$work/sources.list"
cat >"$work/apt.conf" <<CONF
Dir::State "$work";
Dir::State::status "$work/status";
Dir::State::lists "$work/lists";
Dir::Cache "$work/cache";
Dir::Etc::sourcelist "$work/sources.list";
Dir::Etc::sourceparts "-";
Dir::Etc::preferences "-";
Dir::Etc::preferencesparts "-";
APT::Install-Recommends "0";
APT::Get::List-Cleanup "0";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
APT::Update::Error-Mode "any";
Debug::NoLocking "1";
CONF
log=$work/log
apt() {
	APT_CONFIG=$work/apt.conf apt-get -q "$@" >>"$log" 2>&1
}
broken() {
	tail -n 10 "$log" >&2
	fail "$1; is there a network, and $mirror?"
}
apt update || broken "apt-get can't read the list of Debian unstable's packages"

for program in $missing; do
	echo "peers: unpacking $program of Debian unstable"
	rm -f "$work"/cache/archives/*.deb
	apt install -y --download-only "$program" || broken "apt-get can't download $program and its libraries"
	root=$home/$program
	new=$work/$program
	mkdir -p "$new"
	# Debian's tree has /lib and /lib64 as links to those below /usr.
	mkdir -p "$new/usr/lib" "$new/usr/lib64" "$new/usr/bin" "$new/usr/sbin"
	for dir in lib lib64 bin sbin; do ln -s "usr/$dir" "$new/$dir"; done
	for package in "$work"/cache/archives/*.deb; do
		dpkg-deb --fsys-tarfile "$package" | tar -x -C "$new" --keep-directory-symlink --no-same-owner ||
			fail "$package can't be unpacked"
	done
	# Only the program and what it links to.
	rm -rf "$new/usr/share" "$new/var" "$new/etc/apt"
	loader=$(cd "$new" && ls usr/lib64/ld-linux-*.so.* usr/lib/*/ld-linux-*.so.* 2>/dev/null | head -n 1)
	[ -n "$loader" ] || fail "$program came without a loader"
	libraries=$(cd "$new" && ls -d usr/lib/*-linux-gnu | head -n 1)
	rm -rf "$root"
	mkdir -p "$home/bin"
	cp -a "$new" "$root"
	cat >"$home/bin/$program" <<RUN
#!/bin/sh
exec "$root/$loader" --argv0 "$root/usr/sbin/$program" --library-path "$root/$libraries" "$root/usr/sbin/$program" "\$@"
RUN
	chmod 755 "$home/bin/$program"
	"$home/bin/$program" -v >>"$log" 2>&1 || broken "$program was unpacked and does not run"
done
for program in $programs; do "$home/bin/$program" -v 2>&1 | head -n 1; done
