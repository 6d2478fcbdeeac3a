package rules

import (
	"errors"
	"strings"
)

// Errors of RoutePath.
var (
	errPathPercent  = errors.New("holds a % that two hexadecimal digits don't follow (RFC 3986 section 2.1)")
	errPathFragment = errors.New("holds a #, which the path of a request may not contain (RFC 9110 section 4.2.5)")
)

// RoutePath returns the forms in which the path of a request is compared with
// the paths of Routes; these are compared in the same plain form.
//
// plain has one spelling of each character (RFC 3986 section 6.2.2): what may
// stand for itself in a segment is decoded, everything else is percent-encoded in
// upper case, so that /%61 is /a, /caf%c3%a9 is /caf%C3%A9, and %2F is not a
// separator.
//
// strict is how the same path may be read by a server that decodes separators,
// merges slashes, drops parameters after a ; in dot segments and resolves these.
// A request for which the two lead to different routes is ambiguous.
//
// path is as received, without query. It fails for what is not a path.
func RoutePath(path string) (plain, strict string, err error) {
	if path == "" || path == "*" {
		return "/", "/", nil
	}
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	plain, err = plainPath(path)
	if err != nil {
		return "", "", err
	}
	if !strings.Contains(plain, "%2F") && !strings.Contains(plain, "%5C") && !strings.Contains(plain, "//") && !strings.Contains(plain, "/.") {
		return plain, plain, nil
	}
	return plain, strictPath(plain), nil
}

const upperHex = "0123456789ABCDEF"

func plainPath(path string) (string, error) {
	clean := true
	for i := range len(path) {
		clean = clean && (path[i] == '/' || isPathChar(path[i]))
	}
	if clean {
		return path, nil
	}
	var out strings.Builder
	for i := 0; i < len(path); i++ {
		c := path[i]
		switch {
		case c == '#':
			return "", errPathFragment
		case c == '/':
			out.WriteByte(c)
			continue
		case c == '%':
			if i+2 >= len(path) {
				return "", errPathPercent
			}
			high, low := strings.IndexByte(upperHex, upper(path[i+1])), strings.IndexByte(upperHex, upper(path[i+2]))
			if high < 0 || low < 0 {
				return "", errPathPercent
			}
			c = byte(high<<4 | low)
			i += 2
		}
		if isPathChar(c) {
			out.WriteByte(c)
		} else {
			out.WriteByte('%')
			out.WriteByte(upperHex[c>>4])
			out.WriteByte(upperHex[c&15])
		}
	}
	return out.String(), nil
}

func upper(c byte) byte {
	if 'a' <= c && c <= 'z' {
		return c - 'a' + 'A'
	}
	return c
}

// isPathChar reports whether a character stands for itself in a segment (pchar
// of RFC 3986 section 3.3).
func isPathChar(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._~!$&'()*+,;=:@", c) >= 0
}

func strictPath(plain string) string {
	decoded := strings.NewReplacer("%2F", "/", "%5C", "/").Replace(plain)
	var kept []string
	segments := strings.Split(decoded, "/")
	for i, segment := range segments {
		name, _, _ := strings.Cut(segment, ";")
		last := i == len(segments)-1
		switch {
		case name == "..":
			kept = kept[:max(len(kept)-1, 0)]
		case name == "." || segment == "" && !last:
		default:
			kept = append(kept, segment)
			continue
		}
		if last {
			kept = append(kept, "")
		}
	}
	return "/" + strings.Join(kept, "/")
}
