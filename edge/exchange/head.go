package exchange

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// Head is what the head of an HTTP/1 message says about the message.
type Head struct {
	// Start is the request line or the status line.
	Start string
	// Chunked is set when the body comes in chunks.
	Chunked bool
	// Length is the Content-Length, -1 without one.
	Length int64
	// Upgrade is set when Connection names upgrade.
	Upgrade bool
	// Names are the names of fields as they were written, by their canonical
	// form, where these differ. Nil: nowhere.
	Names map[string]string
}

// Errors of CheckHead and CheckLine, besides those that name a field.
var (
	ErrBareLF   = errors.New("a line ends in LF without CR (RFC 9112 section 2.2)")
	ErrControl  = errors.New("a control character (RFC 9110 section 5.5)")
	ErrFold     = errors.New("a folded field line (RFC 9112 section 5.2)")
	ErrName     = errors.New("a field line without a name in front of a colon (RFC 9112 section 5.1)")
	ErrLength   = errors.New("Content-Length is not one decimal number (RFC 9110 section 8.6)")
	ErrFraming  = errors.New("Content-Length and Transfer-Encoding together (RFC 9112 section 6.1)")
	ErrCoding10 = errors.New("Transfer-Encoding in HTTP/1.0 (RFC 9112 section 6.1)")
	// ErrCoding is a transfer coding that is not implemented, chunked twice
	// included: nobody may apply it twice, and nginx and HAProxy refuse it too.
	ErrCoding = errors.New("Transfer-Encoding is not chunked alone (RFC 9112 section 6.1)")
)

// EndOfHead returns where the first head in data ends, after its empty line, or 0
// when it does not end yet. It fails as soon as a line ends in a bare LF. Bytes
// before from have been looked at before.
func EndOfHead(data []byte, from int) (int, error) {
	for at := max(from-3, 0); ; {
		lf := bytes.IndexByte(data[at:], '\n')
		if lf < 0 {
			return 0, nil
		}
		at += lf
		if at == 0 || data[at-1] != '\r' {
			return 0, ErrBareLF
		}
		if at == 1 || at >= 3 && data[at-2] == '\n' && data[at-3] == '\r' {
			return at + 1, nil
		}
		at++
	}
}

// CheckHead checks the head of a request or a response, its empty line included,
// for everything that two parsers could read as two different messages.
// Start and values are checked for characters alone. Folded lines are refused in
// requests; a parser of responses joins them.
func CheckHead(head []byte, request bool) (Head, error) {
	h := Head{Length: -1}
	rest, ok := bytes.CutSuffix(head, []byte("\r\n\r\n"))
	if !ok {
		return h, ErrBareLF
	}
	start, rest, _ := bytes.Cut(rest, []byte("\r\n"))
	if control(start) {
		return h, ErrControl
	}
	h.Start = string(start)
	var coding, length bool
	for more := len(rest) > 0; more; {
		var line []byte
		line, rest, more = bytes.Cut(rest, []byte("\r\n"))
		if len(line) > 0 && (line[0] == ' ' || line[0] == '\t') {
			if request || control(line) || len(h.Start) == 0 {
				return h, ErrFold
			}
			continue
		}
		name, value, err := field(line)
		if err != nil {
			return h, err
		}
		canonical := http.CanonicalHeaderKey(name)
		if canonical != name && h.Names[canonical] == "" {
			if h.Names == nil {
				h.Names = map[string]string{}
			}
			h.Names[canonical] = name
		}
		switch canonical {
		case "Content-Length":
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil || value[0] < '0' || value[0] > '9' || length && (request || n != h.Length) {
				return h, ErrLength
			}
			length, h.Length = true, n
		case "Transfer-Encoding":
			if coding || !strings.EqualFold(value, "chunked") {
				return h, ErrCoding
			}
			coding, h.Chunked = true, true
		case "Connection":
			h.Upgrade = h.Upgrade || httpguts.HeaderValuesContainsToken([]string{value}, "upgrade")
		}
	}
	switch {
	case coding && length:
		return h, ErrFraming
	case coding && strings.Contains(h.Start, "HTTP/1.0"):
		return h, ErrCoding10
	}
	return h, nil
}

// CheckField checks a field line without its CRLF.
func CheckField(line []byte) error {
	if len(line) > 0 && (line[0] == ' ' || line[0] == '\t') {
		return ErrFold
	}
	_, _, err := field(line)
	return err
}

func field(line []byte) (name, value string, err error) {
	raw, rest, ok := bytes.Cut(line, []byte(":"))
	if !ok || !httpguts.ValidHeaderFieldName(string(raw)) {
		return "", "", ErrName
	}
	if control(rest) {
		return "", "", fmt.Errorf("%s holds %w", raw, ErrControl)
	}
	return string(raw), string(bytes.Trim(rest, " \t")), nil
}

// control reports whether text holds a control character other than HTAB. CR is
// one: lines have been cut at CRLF.
func control(text []byte) bool {
	for _, c := range text {
		if c < ' ' && c != '\t' || c == 0x7f {
			return true
		}
	}
	return false
}
