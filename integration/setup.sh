#!/bin/sh
# Installs the Debian packages whose programs the integration tests use as
# backends, clients and etcd members. Does nothing when all are there.
#
#   integration/setup.sh            install what is missing (as root)
#   integration/setup.sh --check    only say what is missing; status 1 if anything is
set -eu

# package=file that shows that it is installed
needed='
nginx=/usr/sbin/nginx
haproxy=/usr/sbin/haproxy
nghttp2-client=/usr/bin/h2load
curl=/usr/bin/curl
openssl=/usr/bin/openssl
gnutls-bin=/usr/bin/gnutls-serv
libnss3-tools=/usr/bin/selfserv
openjdk-17-jdk-headless=javac
libjetty9-java=/usr/share/java/jetty9-server.jar
etcd-server=/usr/bin/etcd
tshark=/usr/bin/tshark
libtomcat9-java=/usr/share/java/tomcat9-catalina.jar
libnetty-java=/usr/share/java/netty-handler.jar
apache2-bin=/usr/sbin/apache2
linux-perf=/usr/bin/perf
'

present() {
	case $1 in
	/*) [ -e "$1" ] ;;
	*) command -v "$1" >/dev/null 2>&1 ;;
	esac
}

missing=
for entry in $needed; do
	present "${entry#*=}" || missing="$missing ${entry%%=*}"
done
missing=${missing# }

if [ -z "$missing" ]; then
	echo "setup: nothing to install"
	exit 0
fi
if [ "${1:-}" = --check ]; then
	echo "setup: missing: $missing" >&2
	exit 1
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
	echo "setup: missing: $missing" >&2
	echo "setup: install them as root, on Debian 12: apt-get install --no-install-recommends $missing" >&2
	exit 1
fi

# policy-rc.d with status 101 forbids maintainer scripts to start services: the
# tests start their own, on free ports.
policy=/usr/sbin/policy-rc.d
ours=
if [ ! -e "$policy" ]; then
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
	ours=yes
	trap 'rm -f "$policy"' EXIT
	trap 'exit 1' HUP INT TERM
fi

echo "setup: installing $missing"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
install_missing() {
	# shellcheck disable=SC2086 # a list of packages
	apt-get install -y -q --no-install-recommends $missing >>"$log" 2>&1
}
if ! install_missing; then
	# The package lists may be old or absent.
	if ! { apt-get update -q >>"$log" 2>&1 && install_missing; }; then
		tail -n 30 "$log" >&2
		rm -f "$log"
		echo "setup: apt-get failed; see above" >&2
		exit 1
	fi
fi
rm -f "$log"

# Where policy-rc.d belongs to someone else it may have let services start.
if [ -z "$ours" ]; then
	for service in nginx haproxy etcd; do
		case " $missing " in
		*" $service "* | *" $service-server "*)
			if command -v invoke-rc.d >/dev/null 2>&1; then
				invoke-rc.d "$service" stop >/dev/null 2>&1 || true
			fi
			;;
		esac
	done
fi
echo "setup: installed $missing; no service was left running"
