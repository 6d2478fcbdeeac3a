package http1

import (
	"errors"
	"fmt"
	"strings"

	"github.com/reseal/reseal/edge/exchange"
)

var (
	errRequestLine  = errors.New("the first line is not a method, a target and HTTP/1, with one space between each (RFC 9112 section 3)")
	errStatusLine   = errors.New("the first line is not HTTP/1 and a status of three digits (RFC 9112 section 4)")
	errVersion      = errors.New("the version is not HTTP/1 (RFC 9112 section 2.3)")
	errConnect      = errors.New("CONNECT is for forward proxies")
	errTarget       = errors.New("the target is neither a path, an http or https URL without userinfo, nor, for OPTIONS, * (RFC 9112 section 3.2)")
	errHost         = errors.New("not one Host with a valid name and port (RFC 9112 section 3.2)")
	errExpectation  = errors.New("the Expect field is not 100-continue (RFC 9110 section 10.1.1)")
	errOptions      = errors.New("the Connection field names more than 64 fields, or stands there more than four times")
	errTrailerField = errors.New("the Trailer field names a field that frames the message (RFC 9110 section 6.5.1)")
	errSwitch       = errors.New("the backend switches to a protocol that the request did not ask for (RFC 9110 section 7.8)")
	errSwitchEarly  = errors.New("the backend switches protocols before the end of the request")
)

// section is what a header section says, taken apart.
type section struct {
	request    bool
	framing    exchange.Framing
	fields     exchange.Fields // that go on
	host       string
	hosts      int
	upgrade    string
	upgrades   int
	connection [4]string // values of Connection
	lines      int       // of these
	named      bool      // Connection names fields
	trailers   bool      // TE names trailers
	expects    bool      // 100-continue
	unexpected bool      // Expect is something else

	// Connection names them.
	close, keepAlive, upgrading bool
}

// parse reads the field lines of text, which begin at line 2 of the head.
func (s *section) parse(text string, http10 bool) error {
	s.framing = exchange.NoFraming
	for rest := text; rest != ""; {
		field, after, err := exchange.CutField(rest)
		if err == nil && !s.request {
			after, err = field.Unfold(after)
		}
		if err == nil {
			err = s.take(field)
		}
		if err != nil {
			return atLine(1+strings.Count(text[:len(text)-len(rest)], "\n"), err)
		}
		rest = after
	}
	if err := s.options(); err != nil {
		return err
	}
	return s.framing.Check(http10)
}

// atLine adds where something is wrong, behind that many lines.
func atLine(before int, err error) error { return fmt.Errorf("line %d of the head: %w", before+1, err) }

func (s *section) take(field exchange.Field) error {
	switch name := exchange.NameOf(field.Name); {
	case name == exchange.ContentLength:
		return s.framing.ContentLength(field.Value, s.request)
	case name == exchange.TransferEncoding:
		return s.framing.TransferEncoding(field.Value)
	case name == exchange.Connection:
		if s.lines == len(s.connection) {
			return errOptions
		}
		s.connection[s.lines] = field.Value
		s.lines++
	case name == exchange.Upgrade:
		s.upgrade = field.Value
		s.upgrades++
	case name == exchange.Trailer:
		goes, err := announces(field.Value)
		if goes {
			s.fields = append(s.fields, field)
		}
		return err
	case name == exchange.TE:
		for coding := range strings.SplitSeq(field.Value, ",") {
			s.trailers = s.trailers || strings.EqualFold(exchange.TrimSpace(coding), "trailers")
		}
	case name.HopByHop():
	case name == exchange.Host && s.request:
		s.host = field.Value
		s.hosts++
	case name == exchange.Expect && s.request:
		s.expects = strings.EqualFold(field.Value, "100-continue")
		s.unexpected = s.unexpected || !s.expects
	default:
		s.fields = append(s.fields, field)
	}
	return nil
}

// announces reports whether a Trailer field goes on: all that it names may come.
// It fails for names that no parser takes there.
func announces(value string) (bool, error) {
	allowed := true
	for name := range strings.SplitSeq(value, ",") {
		name = exchange.TrimSpace(name)
		switch exchange.NameOf(name) {
		case exchange.ContentLength, exchange.TransferEncoding, exchange.Trailer:
			return false, errTrailerField
		}
		allowed = allowed && exchange.TrailerAllowed(name)
	}
	return allowed, nil
}

// options follows Connection: it removes what is named there (RFC 9110 section
// 7.6.1).
func (s *section) options() error {
	count := 0
	for _, line := range s.connection[:s.lines] {
		for option := range strings.SplitSeq(line, ",") {
			option = exchange.TrimSpace(option)
			if count++; count > maxOptions {
				return errOptions
			}
			switch {
			case strings.EqualFold(option, "close"):
				s.close = true
			case strings.EqualFold(option, "keep-alive"):
				s.keepAlive = true
			case strings.EqualFold(option, "upgrade"):
				s.upgrading = true
			case exchange.Removable(option):
				s.fields.Del(option)
				s.named = true
			}
		}
	}
	return nil
}

// hops is what Connection names, for the trailers, which have to go by it, too.
func (s *section) hops() string {
	if !s.named || !s.framing.Chunked {
		return ""
	}
	return strings.Join(s.connection[:s.lines], ",")
}

// persists reports whether the sender lets the connection live (RFC 9112 section
// 9.3).
func (s *section) persists(http10 bool) bool { return !s.close && (!http10 || s.keepAlive) }

// request reads the head of a request.
func (c *Conn) request(text string, event *Event) error {
	line, rest, _ := exchange.CutLine(text[:len(text)-len("\r\n")]) // EndOfHead has seen the CRLF
	method, after, _ := strings.Cut(line, " ")
	target, proto, ok := strings.Cut(after, " ")
	http10, err := version(proto)
	c.head, c.http10 = method == "HEAD", http10 // also of a request that is refused
	switch {
	case !ok || !exchange.ValidToken(method) || errors.Is(err, errRequestLine):
		return c.fail(refused(errRequestLine))
	case err != nil:
		return c.fail(&Error{505, "bad_request", err})
	case method == "CONNECT":
		return c.fail(&Error{405, "method_not_allowed", errConnect})
	}
	s := section{request: true, fields: event.Request.Fields}
	switch err := s.parse(rest, http10); {
	case err != nil:
		return c.fail(refused(err))
	case s.unexpected && !http10:
		return c.fail(&Error{417, "bad_request", errExpectation})
	}
	r := &event.Request
	*r = exchange.Request{Method: method, Scheme: "https", Fields: s.fields, Version: exchange.HTTP11, Trailers: s.trailers}
	if http10 {
		r.Version = exchange.HTTP10
	}
	if err := s.aim(r, target); err != nil {
		return c.fail(err)
	}
	if r.Length = max(s.framing.Length, 0); s.framing.Chunked {
		r.Length = exchange.UnknownLength
	}
	r.Continue = s.expects && !http10 && r.Length != 0
	if s.upgrading && s.upgrades == 1 && !http10 && r.Length == 0 && exchange.ValidUpgrade(s.upgrade) {
		r.Protocol = s.upgrade
	}
	event.Kind = Request
	c.reading, c.writing, c.body = readBody, writeHead, exchange.NewBody(s.framing)
	c.protocol, c.hops, c.expects = r.Protocol, s.hops(), r.Continue
	c.persist = s.persists(http10)
	return nil
}

// version takes HTTP/1.0 and 1.1, and later minor versions for 1.1 (RFC 9110
// section 2.5).
func version(proto string) (http10 bool, err error) {
	if len(proto) != len("HTTP/1.1") || !strings.HasPrefix(proto, "HTTP/") || !digit(proto[5]) || proto[6] != '.' || !digit(proto[7]) {
		return false, errRequestLine
	}
	if proto[5] != '1' {
		return false, errVersion
	}
	return proto[7] == '0', nil
}

func digit(c byte) bool { return '0' <= c && c <= '9' }

// aim finds out where a request is to go: the authority of an absolute target
// stands for Host (RFC 9112 section 3.2.2).
func (s *section) aim(r *exchange.Request, target string) *Error {
	scheme, authority, origin := exchange.SplitTarget(target)
	switch {
	case target == "*":
		if r.Method != "OPTIONS" {
			return &Error{400, "bad_target", errTarget}
		}
	case !exchange.ValidOrigin(origin):
		return &Error{400, "bad_target", errTarget}
	case strings.HasPrefix(target, "/"):
	case strings.EqualFold(scheme, "http"):
		r.Scheme = "http"
	case !strings.EqualFold(scheme, "https"):
		return &Error{400, "bad_target", errTarget}
	}
	_, valid := exchange.HostName(s.host)
	r.Authority, r.Target = s.host, origin
	if scheme != "" {
		_, absolute := exchange.HostName(authority)
		r.Authority, valid = authority, valid && absolute
		if len(target) == len(scheme)+len("://")+len(authority) && r.Method == "OPTIONS" {
			r.Target = "*" // RFC 9112 section 3.2.4
		}
	}
	switch http10 := r.Version == exchange.HTTP10; {
	case strings.Contains(authority, "@"): // RFC 9110 section 4.2.4
		return &Error{400, "bad_target", errTarget}
	case s.hosts > 1 || s.hosts == 0 && !http10 || !valid || r.Authority == "" && (scheme != "" || !http10):
		return &Error{400, "bad_host", errHost}
	}
	return nil
}

// response reads the head of a response.
func (c *Conn) response(text string, event *Event) error {
	line, rest, _ := exchange.CutLine(text[:len(text)-len("\r\n")]) // EndOfHead has seen the CRLF
	const code = len("HTTP/1.1 ")
	if len(line) < code+3 || line[code-1] != ' ' || len(line) > code+3 && line[code+3] != ' ' ||
		line[code] == '0' || !digit(line[code]) || !digit(line[code+1]) || !digit(line[code+2]) || !exchange.ValidValue(line) {
		return c.fail(refused(errStatusLine))
	}
	http10, err := version(line[:code-1])
	if err != nil {
		return c.fail(refused(errStatusLine))
	}
	s := section{fields: event.Response.Fields}
	if err := s.parse(rest, http10); err != nil {
		return c.fail(refused(err))
	}
	r := &event.Response
	*r = exchange.Response{
		Status: int(line[code]-'0')*100 + int(line[code+1]-'0')*10 + int(line[code+2]-'0'),
		Fields: s.fields, Length: s.framing.Length, Version: exchange.HTTP11,
	}
	if http10 {
		r.Version = exchange.HTTP10
	}
	event.Kind = Response
	switch {
	case r.Status == 101:
		return c.switched(&s, event)
	case r.Status < 200:
		event.Kind = Informational
		c.suspect(s.framing)
		if c.informational++; c.informational > maxInformational {
			return c.fail(refused(errEndless1xx))
		}
		return nil
	case r.Status == 204:
		c.suspect(s.framing)
		c.body = exchange.Body{}
	case c.head || r.Status == 304:
		c.body = exchange.Body{}
	case !s.framing.Chunked && s.framing.Length < 0:
		c.body = exchange.BodyToClose()
		c.persist = false
	default:
		c.body = exchange.NewBody(s.framing)
	}
	c.reading, c.protocol, c.hops = readBody, "", s.hops()
	c.persist = c.persist && s.persists(http10)
	return nil
}

// suspect makes an exchange the last one whose response can't have a body and
// announces one: who knows whether it follows (RFC 9112 section 6.3).
func (c *Conn) suspect(framing exchange.Framing) {
	if framing.Chunked || framing.Length > 0 {
		c.closing = true
	}
}

// switched is the beginning of a tunnel.
func (c *Conn) switched(s *section, event *Event) error {
	switch {
	case c.protocol == "" || s.upgrades != 1 || !strings.EqualFold(s.upgrade, c.protocol):
		return c.fail(refused(errSwitch))
	case c.writing != writeEnd:
		return c.fail(refused(errSwitchEarly))
	}
	event.Response.Protocol = s.upgrade
	c.reading, c.writing, c.closing = readRaw, writeRaw, true
	return nil
}
