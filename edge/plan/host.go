package plan

import (
	"net/netip"
	"strings"
)

// NormalizeHost is the form in which hosts are compared: of host[:port] the
// host in lower case, without port, trailing dot or IPv6 brackets; an IP address
// in its canonical form (RFC 5952). It returns "" for what is not a host at all.
func NormalizeHost(hostport string) string {
	host, bracketed := withoutPort(hostport)
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if bracketed || strings.IndexByte(host, ':') >= 0 {
		address, err := netip.ParseAddr(host)
		if err != nil || !address.Is6() {
			return ""
		}
		return address.String()
	}
	for i := range len(host) {
		if !nameByte(host[i]) && host[i] != '.' {
			return ""
		}
	}
	return host
}

// nameByte reports whether c may stand in a label (RFC 1123, and underscores,
// which are in use).
func nameByte(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_'
}

// withoutPort cuts ":port" off and takes IPv6 literals out of their brackets.
func withoutPort(hostport string) (host string, bracketed bool) {
	if strings.HasPrefix(hostport, "[") {
		end := strings.IndexByte(hostport, ']')
		if end < 0 || end+1 < len(hostport) && hostport[end+1] != ':' {
			return "", true
		}
		return hostport[1:end], true
	}
	colon := strings.IndexByte(hostport, ':')
	if colon < 0 || strings.IndexByte(hostport[colon+1:], ':') >= 0 {
		return hostport, false // no port, or a bare IPv6 address
	}
	return hostport[:colon], false
}

// validName reports whether name is a host name in lower case.
func validName(name string) bool {
	if name == "" || len(name) > 253 {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := range len(label) {
			if !nameByte(label[i]) {
				return false
			}
		}
	}
	return true
}
