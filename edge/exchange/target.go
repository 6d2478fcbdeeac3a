package exchange

import (
	"net/netip"
	"strings"
)

// HostName is the form in which hosts are compared: of host[:port] the host in
// lower case, without port, trailing dot or IPv6 brackets. It reports false for
// what is not a host. The empty string, as HTTP/1.0 allows, is fine.
func HostName(authority string) (string, bool) {
	host, port := authority, ""
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

// SameAuthority reports whether two values of host[:port] name the same host and
// port. 443 is the port that https has without one.
func SameAuthority(a, b string) bool {
	hostA, okA := HostName(a)
	hostB, okB := HostName(b)
	return okA && okB && hostA == hostB && httpsPort(a) == httpsPort(b)
}

func httpsPort(authority string) string {
	colon := strings.LastIndexByte(authority, ':')
	if colon < strings.LastIndexByte(authority, ']') || colon < 0 || authority[colon:] == ":" {
		return "443"
	}
	return authority[colon+1:]
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

// SplitTarget takes a request target apart (RFC 9112 section 3.2). origin goes on
// to the backend: the origin form, or "*". scheme and authority are those of the
// absolute form, as they came, and "" otherwise.
func SplitTarget(target string) (scheme, authority, origin string) {
	if target == "*" || strings.HasPrefix(target, "/") {
		return "", "", target
	}
	scheme, rest, _ := strings.Cut(target, "://")
	end := strings.IndexAny(rest, "/?")
	if end < 0 {
		return scheme, rest, "/"
	}
	if authority, origin = rest[:end], rest[end:]; origin[0] == '?' {
		origin = "/" + origin
	}
	return scheme, authority, origin
}

// ValidOrigin reports whether target is a target in origin form: a path, with a
// query or without. It takes bytes above 0x7f, which clients send, and, in a
// query, a % that encodes nothing; neither whitespace nor control characters nor
// a fragment.
func ValidOrigin(target string) bool {
	if target == "" || target[0] != '/' {
		return false
	}
	query := false
	for i := 0; i < len(target); i++ {
		switch c := target[i]; {
		case c <= ' ' || c == 0x7f || c == '#':
			return false
		case c == '?':
			query = true
		case c == '%' && !query && (i+2 >= len(target) || hexDigit(target[i+1]) < 0 || hexDigit(target[i+2]) < 0):
			return false
		}
	}
	return true
}
