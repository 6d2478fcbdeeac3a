package rules

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// The checks below return what is wrong with a value, in words for people.

// checkName checks a resource name: dotted DNS labels (RFC 1123 section 2.1) in
// lower case.
func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("is empty; it must be a name")
	case len(name) > 253:
		return fmt.Errorf("is %d bytes long; a name has at most 253", len(name))
	case !isDotted(name, isLower, "-"):
		return fmt.Errorf("%s is not a name; use lower-case letters, digits, - and ., starting and ending with a letter or digit", Quote(name))
	}
	return nil
}

// isDotted says whether text is labels of 1 to 63 characters joined by dots.
// Each starts and ends with a letter or digit, or one of the edge characters.
func isDotted(text string, letter func(byte) bool, extra string) bool {
	for label := range strings.SplitSeq(text, ".") {
		if len(label) > 63 || !isWord(label, letter, extra) {
			return false
		}
	}
	return true
}

// isWord says whether text holds only letters and extra characters, and letters
// at both ends.
func isWord(text string, letter func(byte) bool, extra string) bool {
	if text == "" || !letter(text[0]) || !letter(text[len(text)-1]) {
		return false
	}
	for i := range len(text) {
		if !letter(text[i]) && strings.IndexByte(extra, text[i]) < 0 {
			return false
		}
	}
	return true
}

func isLower(b byte) bool { return 'a' <= b && b <= 'z' || '0' <= b && b <= '9' }

func isAlphanumeric(b byte) bool { return isLower(b) || 'A' <= b && b <= 'Z' }

// isHostByte allows what resolvers and certificates in the wild hold besides
// letters and digits.
func isHostByte(b byte) bool { return isAlphanumeric(b) || b == '_' }

// checkLabelKey checks the key of a label or annotation: a word of at most 63
// characters, with a DNS name and "/" in front if wanted.
func checkLabelKey(key string) error {
	name := key
	if prefix, rest, ok := strings.Cut(key, "/"); ok {
		if checkName(prefix) != nil {
			return fmt.Errorf("the key's prefix %s is not a DNS name", Quote(prefix))
		}
		name = rest
	}
	if len(name) > 63 || !isWord(name, isAlphanumeric, "-_.") {
		return fmt.Errorf("%s is not a key; use at most 63 letters, digits, -, _ and ., starting and ending with a letter or digit", Quote(key))
	}
	return nil
}

func checkLabelValue(value string) error {
	if value != "" && (len(value) > 63 || !isWord(value, isAlphanumeric, "-_.")) {
		return fmt.Errorf("%s is not a label value; use at most 63 letters, digits, -, _ and ., starting and ending with a letter or digit", Quote(value))
	}
	return nil
}

// checkHost checks an IP address or a host name.
func checkHost(host string) error {
	if _, err := netip.ParseAddr(host); err == nil {
		return nil
	}
	return checkHostName(host)
}

func checkHostName(host string) error {
	switch {
	case host == "":
		return errors.New("is empty; it must be a host name")
	case len(host) > 253 || !isDotted(host, isHostByte, "-"):
		return fmt.Errorf("%s is not a host name", Quote(host))
	case strings.Trim(host[strings.LastIndexByte(host, '.')+1:], "0123456789") == "":
		return fmt.Errorf("%s is neither an IP address nor a host name", Quote(host))
	}
	return nil
}

// checkServerName checks a name as it is compared: lower case, no trailing dot.
func checkServerName(host string) error {
	if err := checkHost(host); err != nil {
		return err
	}
	return checkLowerCase(host)
}

func checkLowerCase(host string) error {
	if lower := strings.ToLower(host); lower != host {
		return fmt.Errorf("%s must be lower case: %q", Quote(host), lower)
	}
	return nil
}

// checkHostPort checks host:port. The host may be empty only for addresses to
// listen on.
func checkHostPort(address string, mayOmitHost bool) error {
	return checkAddress(address, mayOmitHost, false)
}

// checkAddress is checkHostPort, except that the port may be 0 where the system may
// choose one.
func checkAddress(address string, mayOmitHost, mayBeZero bool) error {
	if address == "" {
		return errors.New("is missing; it must be host:port")
	}
	if strings.Contains(address, "://") {
		return fmt.Errorf("%s is a URL; write host:port", Quote(address))
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return hostPortError(address)
	}
	if number, err := strconv.ParseUint(port, 10, 16); err != nil || number == 0 && !mayBeZero {
		return fmt.Errorf("%s: the port must be a number from 1 to 65535", Quote(address))
	}
	if host == "" {
		if mayOmitHost {
			return nil
		}
		return fmt.Errorf("%s has no host", Quote(address))
	}
	return checkHost(host)
}

// hostPortError says why an address does not split.
func hostPortError(address string) error {
	bare := strings.Trim(address, "[]")
	switch ip, err := netip.ParseAddr(bare); {
	case err == nil && ip.Is6():
		return fmt.Errorf("%s has no port; write [%s]:443", Quote(address), bare)
	case !strings.Contains(address, ":"):
		return fmt.Errorf("%s has no port", Quote(address))
	}
	return fmt.Errorf("%s is not host:port; an IPv6 address stands in brackets, as in [2001:db8::1]:443", Quote(address))
}

// checkHostPattern checks a host name, an IP address, or "*." with a suffix.
func checkHostPattern(pattern string) error {
	if pattern == "*" {
		return errors.New(`"*" is not needed; leave hosts out to match any host`)
	}
	if _, _, err := net.SplitHostPort(pattern); err == nil {
		return fmt.Errorf("%s has a port; write the host alone", Quote(pattern))
	}
	suffix, isWildcard := strings.CutPrefix(pattern, "*.")
	check := checkHost
	if isWildcard {
		check = checkHostName
	}
	if check(suffix) != nil {
		return fmt.Errorf(`%s is neither a host name nor "*." with a suffix`, Quote(pattern))
	}
	return checkLowerCase(pattern)
}

// checkAltName checks a DNS name, which may be a wildcard, an IP address or a URI
// of a certificate.
func checkAltName(name string) error {
	suffix, isWildcard := strings.CutPrefix(name, "*.")
	if isWildcard && checkHostName(suffix) == nil || checkHost(name) == nil {
		return nil
	}
	// host:port would also parse, with the host as scheme.
	if uri, err := url.Parse(name); err == nil && uri.Scheme != "" &&
		(uri.Host != "" || strings.Trim(uri.Opaque, "0123456789") != "") {
		return nil
	}
	return fmt.Errorf("%s is neither a DNS name, an IP address nor a URI", Quote(name))
}

func checkCIDR(text string) error {
	prefix, err := netip.ParsePrefix(text)
	if err != nil {
		if ip, err := netip.ParseAddr(text); err == nil {
			return fmt.Errorf("%s has no prefix length; write %s/%d", Quote(text), text, ip.BitLen())
		}
		return fmt.Errorf("%s is not a CIDR such as 10.0.0.0/8", Quote(text))
	}
	if masked := prefix.Masked(); masked != prefix {
		return fmt.Errorf("%s has bits set beyond its prefix; write %s", Quote(text), masked)
	}
	return nil
}

// checkFile checks a path on the edge, whose working directory nobody knows
// here.
func checkFile(path string) error {
	if !filepath.IsAbs(path) || strings.ContainsAny(path, "\x00\r\n") {
		return fmt.Errorf("%s is not an absolute path", Quote(path))
	}
	return nil
}

// checkPath checks the path of a request, without query.
func checkPath(path string) error {
	switch {
	case !strings.HasPrefix(path, "/"):
		return fmt.Errorf("%s does not start with /", Quote(path))
	case strings.ContainsAny(path, "?#"):
		return fmt.Errorf("%s holds a query or fragment; write the path alone", Quote(path))
	}
	for i := range len(path) {
		if path[i] <= ' ' || path[i] >= 0x7f {
			return fmt.Errorf("%s holds a character that must be percent-encoded", Quote(path))
		}
	}
	if _, err := url.ParseRequestURI(path); err != nil {
		return fmt.Errorf("%s is not a path", Quote(path))
	}
	return nil
}

func checkHeaderName(name string) error {
	if !httpguts.ValidHeaderFieldName(name) {
		return fmt.Errorf("%s is not a header name (RFC 9110 section 5.1)", Quote(name))
	}
	return nil
}

func checkHeaderValue(value string) error {
	if !httpguts.ValidHeaderFieldValue(value) {
		return errors.New("is not a header value (RFC 9110 section 5.5): it holds control characters")
	}
	return nil
}
