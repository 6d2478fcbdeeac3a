package frontend

import (
	"net/netip"
	"strings"
)

// hostName is the form in which hosts are compared: of host[:port] the host in
// lower case, without port, trailing dot or IPv6 brackets. It reports false for
// what is not a host. The empty string, as HTTP/1.0 allows, is fine.
func hostName(hostport string) (string, bool) {
	host, port := hostport, ""
	if strings.HasPrefix(host, "[") {
		end := strings.IndexByte(host, ']')
		if end < 0 {
			return "", false
		}
		address, err := netip.ParseAddr(host[1:end])
		if err != nil || !address.Is6() || address.Zone() != "" {
			return "", false
		}
		return address.String(), validPort(host[end+1:])
	}
	if colon := strings.IndexByte(host, ':'); colon >= 0 {
		host, port = host[:colon], host[colon:]
		if host == "" {
			return "", false
		}
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	for i := range len(host) {
		c := host[i]
		if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '.' || c == '_') {
			return "", false
		}
	}
	return host, validPort(port)
}

// sameAuthority reports whether two values of host[:port] name the same host and
// port. 443 is the port that https has without one.
func sameAuthority(a, b string) bool {
	hostA, okA := hostName(a)
	hostB, okB := hostName(b)
	return okA && okB && hostA == hostB && httpsPort(a) == httpsPort(b)
}

func httpsPort(hostport string) string {
	colon := strings.LastIndexByte(hostport, ':')
	if colon < strings.LastIndexByte(hostport, ']') || colon < 0 || hostport[colon:] == ":" {
		return "443"
	}
	return hostport[colon+1:]
}

// validPort takes "", ":" and ":" with digits (RFC 3986 section 3.2.3).
func validPort(port string) bool {
	if port == "" {
		return true
	}
	if port[0] != ':' {
		return false
	}
	for i := 1; i < len(port); i++ {
		if port[i] < '0' || port[i] > '9' {
			return false
		}
	}
	return true
}

// originForm is a request target as it goes to the backend: without the scheme
// and the authority of the absolute form (RFC 9112 section 3.2).
func originForm(target string) string {
	if target == "*" || strings.HasPrefix(target, "/") {
		return target
	}
	_, rest, _ := strings.Cut(target, "://")
	if end := strings.IndexAny(rest, "/?"); end >= 0 {
		rest = rest[end:]
	} else {
		rest = ""
	}
	if !strings.HasPrefix(rest, "/") {
		rest = "/" + rest
	}
	return rest
}
