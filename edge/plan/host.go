package plan

import (
	"net/netip"
	"strings"

	"github.com/reseal/reseal/edge/exchange"
)

// NormalizeHost is exchange.HostName for what configurations and certificates hold,
// where IPv6 addresses may stand without brackets. It returns "" for what is not a
// host at all.
func NormalizeHost(host string) string {
	if address, err := netip.ParseAddr(host); err == nil && address.Is6() && address.Zone() == "" {
		return address.String()
	}
	name, ok := exchange.HostName(host)
	if !ok {
		return ""
	}
	return name
}

// nameByte reports whether c may stand in a label (RFC 1123, and underscores,
// which are in use).
func nameByte(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_'
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
