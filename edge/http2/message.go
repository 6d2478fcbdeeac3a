package http2

import (
	"strings"

	"github.com/reseal/reseal/edge/exchange"
)

// What makes a message malformed (RFC 9113 section 8.1.1).
const (
	wrongOrder     = "a pseudo-header field after other fields, or in trailers (RFC 9113 section 8.3)"
	wrongPseudo    = "a pseudo-header field that is not known, or comes twice (RFC 9113 section 8.3)"
	wrongName      = "the name of a field is not a token in lower case (RFC 9113 section 8.2.1)"
	wrongValue     = "the value of a field holds a control character, or begins or ends with a space (RFC 9113 section 8.2.1)"
	wrongHop       = "a field that concerns one connection alone (RFC 9113 section 8.2.2)"
	wrongLength    = "Content-Length is not one decimal number (RFC 9110 section 8.6)"
	wrongEnd       = "the message ends before the content that Content-Length says (RFC 9113 section 8.1.1)"
	wrongMethod    = "no method, or one that is not a token (RFC 9113 section 8.3.1)"
	wrongScheme    = "no scheme, or not http or https (RFC 9113 section 8.3.1)"
	wrongPath      = "no path, or not one of the origin form (RFC 9113 section 8.3.1)"
	wrongAuthority = "no authority, or one with characters that no host has (RFC 9113 section 8.3.1)"
	wrongHost      = "Host comes twice (RFC 9110 section 7.2)"
	wrongConnect   = "CONNECT with fields that it can't have (RFC 9113 section 8.5, RFC 8441 section 4)"
	wrongProtocol  = ":protocol without CONNECT, or though nobody offered it (RFC 8441 section 4)"
	wrongStatus    = "not one :status of three digits (RFC 9113 section 8.3.2)"
	wrongSwitch    = "101 in HTTP/2 (RFC 9113 section 8.6)"
	wrongEarlyEnd  = "an informational response ends the message (RFC 9113 section 8.1)"
	wrongHeader    = "the header section is too large (RFC 9113 section 10.5.1)"
)

// pseudo are the pseudo-header fields of a message.
type pseudo struct {
	values [6]string
	has    [6]bool
}

const (
	pseudoMethod = iota
	pseudoScheme
	pseudoAuthority
	pseudoPath
	pseudoProtocol
	pseudoStatus
)

var pseudoNames = [...]string{":method", ":scheme", ":authority", ":path", ":protocol", ":status"}

// take takes a pseudo-header field of a request (from, to: those before :status)
// or of a response.
func (p *pseudo) take(f *rawField, from, to int) bool {
	for i := from; i < to; i++ {
		if f.name == pseudoNames[i] && !p.has[i] {
			p.values[i], p.has[i] = f.value, true
			return true
		}
	}
	return false
}

// special are fields that are no part of Fields.
type special struct {
	length   int64
	hosts    int
	host     string
	expect   string
	expected bool
	trailers bool
	cookieAt int // in Fields, -1: there is none
	crumbs   int
}

// readFields reads the fields of a section into *fields, pseudo-header fields from
// from to to into p.
func (s *scratch) readFields(fields *exchange.Fields, p *pseudo, from, to int, x *special) string {
	x.length, x.cookieAt = exchange.UnknownLength, -1
	regular := false
	for i := range s.fields {
		f := &s.fields[i]
		if !f.checked && !validValue(f.value) {
			return wrongValue
		}
		if strings.HasPrefix(f.name, ":") {
			switch {
			case regular || from == to:
				return wrongOrder
			case !p.take(f, from, to):
				return wrongPseudo
			}
			continue
		}
		regular = true
		if !f.checked && !validName(f.name) {
			return wrongName
		}
		passed, wrong := x.take(f, to <= pseudoStatus)
		if wrong != "" {
			return wrong
		}
		switch {
		case !passed:
		case f.name == "cookie" && x.cookieAt >= 0:
			s.crumb((*fields)[x.cookieAt].Value, f.value, x.crumbs == 1)
			x.crumbs++
			(*fields)[x.cookieAt].Secret = (*fields)[x.cookieAt].Secret || f.secret
		case f.name == "cookie":
			x.cookieAt, x.crumbs = len(*fields), 1
			fallthrough
		default:
			*fields = append(*fields, exchange.Field{Name: f.name, Value: f.value, Secret: f.secret})
		}
	}
	if x.crumbs > 1 {
		(*fields)[x.cookieAt].Value = string(s.cookies)
	}
	return ""
}

// crumb joins a cookie that comes in several fields: outside of HTTP/2 it is one
// (RFC 9113 section 8.2.3).
func (s *scratch) crumb(first, next string, begin bool) {
	if begin {
		s.cookies = append(s.cookies[:0], first...)
	}
	s.cookies = append(append(s.cookies, "; "...), next...)
}

// take takes a field that is not passed on, or reports that it is passed on.
func (x *special) take(f *rawField, request bool) (passed bool, wrong string) {
	switch exchange.NameOf(f.name) {
	case exchange.ContentLength:
		n, ok := parseLength(f.value)
		if !ok || x.length != exchange.UnknownLength {
			return false, wrongLength
		}
		x.length = n
	case exchange.TE:
		if !request || f.value != "trailers" {
			return false, wrongHop
		}
		x.trailers = true
	case exchange.Host:
		x.hosts++
		x.host = f.value
		return !request, ""
	case exchange.Expect:
		if x.expect = f.value; x.expected {
			x.expect = "" // not this alone
		}
		x.expected = true
		return !request, ""
	case exchange.Connection, exchange.TransferEncoding, exchange.Upgrade:
		return false, wrongHop
	case exchange.Hop:
		if !strings.HasPrefix(f.name, "proxy-auth") { // for this proxy, and no further
			return false, wrongHop
		}
	default:
		return true, ""
	}
	return false, ""
}

func parseLength(s string) (n int64, ok bool) {
	if s == "" || len(s) > 18 {
		return 0, false
	}
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
		n = 10*n + int64(s[i]-'0')
	}
	return n, true
}

// readRequest reads a request into ev, of Kind Request or Refused. It returns
// what makes the request malformed.
func (c *Conn) readRequest(end bool, ev *Event) (wrong string) {
	var p pseudo
	var x special
	r := &ev.Request
	if wrong := ev.heads.readFields(&r.Fields, &p, pseudoMethod, pseudoStatus, &x); wrong != "" {
		return wrong
	}
	r.Version = exchange.HTTP2
	r.Method, r.Scheme, r.Authority = p.values[pseudoMethod], p.values[pseudoScheme], p.values[pseudoAuthority]
	r.Target, r.Protocol = p.values[pseudoPath], p.values[pseudoProtocol]
	r.Length, r.Trailers, r.Continue = x.length, x.trailers, x.expected && !end
	ev.Kind = Request
	if ev.heads.overflow != fits {
		ev.Kind, ev.Status, ev.Reason = Refused, 431, "header_too_large"
		if ev.heads.overflow == tooMany {
			ev.Reason = "too_many_fields"
		}
		r.Length = exchange.UnknownLength // it may not have been read
		return ""
	}
	if end && r.Length > 0 {
		return wrongEnd
	}
	if end {
		r.Length = 0
	}
	if !exchange.ValidToken(r.Method) {
		return wrongMethod
	}
	if x.hosts > 1 {
		return wrongHost
	}
	if r.Authority == "" && !p.has[pseudoAuthority] {
		r.Authority = x.host
	}
	if !validAuthority(r.Authority) {
		return wrongAuthority
	}
	if r.Method == "CONNECT" {
		if wrong := c.checkConnect(r, &p, &x, end, ev); wrong != "" {
			return wrong
		}
	} else if wrong := checkTarget(r, &p); wrong != "" {
		return wrong
	}
	switch {
	case ev.Kind == Refused:
	case !isHost(r.Authority) || x.hosts == 1 && !exchange.SameAuthority(x.host, r.Authority):
		ev.Kind, ev.Status, ev.Reason = Refused, 400, "bad_host"
	case x.expected && !strings.EqualFold(x.expect, "100-continue"):
		ev.Kind, ev.Status, ev.Reason = Refused, 417, "bad_request"
	}
	return ""
}

// checkTarget checks what says where a request other than CONNECT goes.
func checkTarget(r *exchange.Request, p *pseudo) (wrong string) {
	switch {
	case p.has[pseudoProtocol]:
		return wrongProtocol
	case r.Scheme != "https" && r.Scheme != "http":
		return wrongScheme
	case !validTarget(r.Target, r.Method):
		return wrongPath
	}
	return ""
}

// checkConnect checks CONNECT: without :protocol, which nobody serves (RFC 9113
// section 8.5), and with it (RFC 8441).
func (c *Conn) checkConnect(r *exchange.Request, p *pseudo, x *special, end bool, ev *Event) (wrong string) {
	if x.length != exchange.UnknownLength || x.expected {
		return wrongConnect
	}
	if !end {
		r.Length = exchange.UnknownLength
	}
	if !p.has[pseudoProtocol] {
		if p.has[pseudoScheme] || p.has[pseudoPath] {
			return wrongConnect
		}
		ev.Kind, ev.Status, ev.Reason = Refused, 405, "method_not_allowed"
		return ""
	}
	switch {
	case !c.cfg.ExtendedConnect || !exchange.ValidToken(r.Protocol):
		return wrongProtocol
	case r.Scheme != "https" && r.Scheme != "http":
		return wrongScheme
	case !validTarget(r.Target, ""):
		return wrongPath
	}
	return ""
}

// readResponse reads a response into ev.
func (c *Conn) readResponse(end bool, s *stream, ev *Event) (wrong string) {
	var p pseudo
	var x special
	r := &ev.Response
	if wrong := ev.heads.readFields(&r.Fields, &p, pseudoStatus, pseudoStatus+1, &x); wrong != "" {
		return wrong
	}
	if ev.heads.overflow != fits {
		return wrongHeader
	}
	status, ok := parseLength(p.values[pseudoStatus])
	if len(p.values[pseudoStatus]) != 3 || !ok || status < 100 {
		return wrongStatus
	}
	r.Status, r.Length, r.Version = int(status), x.length, exchange.HTTP2
	switch {
	case status == 101:
		return wrongSwitch
	case status < 200 && end:
		return wrongEarlyEnd
	case s.tunnel && status/100 == 2:
		r.Protocol, r.Length = s.protocol, exchange.UnknownLength // RFC 9110 section 9.3.6
	case end && r.Length > 0 && !hasNoBody(s.toHead, r.Status):
		return wrongEnd
	}
	return ""
}

// readTrailers reads trailers into ev. Which of them may be passed on,
// exchange.TrailerAllowed says.
func readTrailers(ev *Event) (wrong string) {
	for i := range ev.heads.fields {
		f := &ev.heads.fields[i]
		switch {
		case strings.HasPrefix(f.name, ":"):
			return wrongOrder
		case !validName(f.name):
			return wrongName
		case !validValue(f.value):
			return wrongValue
		case exchange.NameOf(f.name).HopByHop() && f.name != "trailer":
			return wrongHop
		}
		ev.Trailers = append(ev.Trailers, exchange.Field{Name: f.name, Value: f.value, Secret: f.secret})
	}
	return ""
}

// validName reports whether a name is a token in lower case.
func validName(name string) bool {
	for i := range len(name) {
		if lower(name[i]) != name[i] {
			return false
		}
	}
	return exchange.ValidToken(name)
}

// lower is the lower case of a character of a token.
func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// validValue reports whether a value has no control characters but HTAB, and no
// space at its ends.
func validValue(s string) bool { return exchange.ValidValue(s) && exchange.TrimSpace(s) == s }

// validAuthority takes what may be host[:port]: no user information (RFC 9113
// section 8.3.1), nothing that ends the authority in a URI, nothing invisible.
// What is no host for other reasons is refused, not malformed.
func validAuthority(s string) bool {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || strings.IndexByte(`@/?#\`, c) >= 0 {
			return false
		}
	}
	return s != ""
}

func isHost(authority string) bool {
	_, ok := exchange.HostName(authority)
	return ok
}

// validTarget takes the origin form of a target, or "*" with OPTIONS (RFC 9113
// section 8.3.1).
func validTarget(s, method string) bool {
	return exchange.ValidOrigin(s) || s == "*" && method == "OPTIONS"
}
