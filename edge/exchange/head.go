package exchange

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Framing is what the fields of a head say of the body. It begins as NoFraming.
type Framing struct {
	// Chunked is set when the body comes in chunks.
	Chunked bool
	// Length is the Content-Length, UnknownLength without one.
	Length int64
}

// NoFraming is the framing of a head that says nothing of the body.
var NoFraming = Framing{Length: UnknownLength}

// Errors of heads, besides those that name a field.
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

// CutLine cuts the first line off text. All lines end in CRLF.
func CutLine(text string) (line, rest string, err error) {
	lf := strings.IndexByte(text, '\n')
	if lf < 1 || text[lf-1] != '\r' {
		return "", "", ErrBareLF
	}
	return text[:lf-1], text[lf+1:], nil
}

// CutField cuts the first field line off a header or trailer section.
func CutField(section string) (field Field, rest string, err error) {
	line, rest, err := CutLine(section)
	if err != nil {
		return Field{}, "", err
	}
	end := 0
	for end < len(line) && tokenByte(line[end]) {
		end++
	}
	switch {
	case folded(line):
		return Field{}, "", ErrFold
	case end == 0 || end == len(line) || line[end] != ':':
		return Field{}, "", ErrName
	case !ValidValue(line[end+1:]):
		return Field{}, "", fmt.Errorf("%s holds %w", line[:end], ErrControl)
	}
	return Field{Name: line[:end], Value: TrimSpace(line[end+1:])}, rest, nil
}

func folded(line string) bool { return line != "" && (line[0] == ' ' || line[0] == '\t') }

// Unfold joins the lines of a response into which field goes on, as RFC 9112
// section 5.2 wants it, and returns what follows them. It fails for fields that
// mean something to the protocol.
func (f *Field) Unfold(section string) (rest string, err error) {
	if !folded(section) {
		return section, nil
	}
	if NameOf(f.Name) != OtherName {
		return "", ErrFold
	}
	joined := []byte(f.Value)
	for rest = section; folded(rest); {
		var line string
		if line, rest, err = CutLine(rest); err != nil {
			return "", err
		}
		if !ValidValue(line) {
			return "", fmt.Errorf("%s holds %w", f.Name, ErrControl)
		}
		joined = append(append(joined, ' '), TrimSpace(line)...)
	}
	f.Value = TrimSpace(string(joined))
	return rest, nil
}

// ContentLength takes in a field of that name. Responses may repeat it.
func (f *Framing) ContentLength(value string, request bool) error {
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil || value[0] < '0' || value[0] > '9' || f.Length >= 0 && (request || n != f.Length) {
		return ErrLength
	}
	f.Length = n
	return nil
}

// TransferEncoding takes in a field of that name.
func (f *Framing) TransferEncoding(value string) error {
	if f.Chunked || !strings.EqualFold(value, "chunked") {
		return ErrCoding
	}
	f.Chunked = true
	return nil
}

// Check fails when the fields of a message contradict each other, or the version.
func (f Framing) Check(http10 bool) error {
	switch {
	case f.Chunked && f.Length >= 0:
		return ErrFraming
	case f.Chunked && http10:
		return ErrCoding10
	}
	return nil
}
