package exchange

import (
	"bytes"
	"errors"
)

// FramingError is a body that breaks the framing which its head announced.
type FramingError struct{ error }

// Unwrap returns what is wrong.
func (e FramingError) Unwrap() error { return e.error }

// Body follows the body of an HTTP/1 message through a stream of bytes, as
// strictly as CheckHead follows heads.
type Body struct {
	step    step
	left    uint64 // of a body of known length, or of a chunk's data
	line    []byte // the part of a line that has come: size or trailer
	trailer int    // bytes of trailer lines
}

type step int8

const (
	bodyOver step = iota
	bodyBytes
	chunkSize
	chunkData
	chunkEnd
	chunkTrailer
)

const (
	// maxChunkLine bounds a chunk's size with its extensions.
	maxChunkLine = 4 << 10
	// maxTrailer bounds a trailer section.
	maxTrailer = 64 << 10
)

// NewBody follows the body that head announces; a request without a length has
// none.
func NewBody(head Head) Body {
	switch {
	case head.Chunked:
		return Body{step: chunkSize}
	case head.Length > 0:
		return Body{step: bodyBytes, left: uint64(head.Length)}
	}
	return Body{}
}

// Over reports whether the body has ended.
func (b *Body) Over() bool { return b.step == bodyOver }

// Advance takes what came and returns how much of it belongs to the body. Errors
// are FramingErrors; the bytes before are good.
func (b *Body) Advance(data []byte) (int, error) {
	at := 0
	for at < len(data) && b.step != bodyOver {
		switch b.step {
		case bodyBytes, chunkData:
			n := min(uint64(len(data)-at), b.left)
			at += int(n)
			switch b.left -= n; {
			case b.left > 0:
			case b.step == bodyBytes:
				b.step = bodyOver
			default:
				b.step = chunkEnd
			}
		default:
			n, line, err := b.readLine(data[at:])
			if err != nil {
				return at, FramingError{err}
			}
			at += n
			if line == nil {
				continue
			}
			if err := b.endLine(line); err != nil {
				return at, FramingError{err}
			}
			b.line = b.line[:0]
		}
	}
	return at, nil
}

// readLine collects a line. It returns nil while the line has not ended.
func (b *Body) readLine(data []byte) (n int, line []byte, err error) {
	lf := bytes.IndexByte(data, '\n')
	if lf < 0 {
		b.line = append(b.line, data...)
		n = len(data)
	} else {
		b.line = append(b.line, data[:lf+1]...)
		n = lf + 1
	}
	most := maxChunkLine
	if b.step == chunkTrailer {
		most = maxTrailer - b.trailer
	}
	switch {
	case len(b.line) > most:
		return 0, nil, errors.New("the line of a chunk or a trailer section is too long")
	case lf < 0:
		return n, nil, nil
	}
	line, ok := bytes.CutSuffix(b.line, []byte("\r\n"))
	if !ok {
		return 0, nil, ErrBareLF
	}
	return n, line, nil
}

func (b *Body) endLine(line []byte) error {
	switch b.step {
	case chunkEnd:
		if len(line) > 0 {
			return errors.New("a chunk is longer than its size")
		}
		b.step = chunkSize
	case chunkSize:
		size, err := parseChunkSize(line)
		if err != nil {
			return err
		}
		b.left, b.step = size, chunkData
		if size == 0 {
			b.step = chunkTrailer
		}
	case chunkTrailer:
		if len(line) == 0 {
			b.step, b.line = bodyOver, nil
			return nil
		}
		b.trailer += len(line)
		return CheckField(line)
	}
	return nil
}

// parseChunkSize parses a chunk's size and checks its extensions' characters
// (RFC 9112 section 7.1). 15 digits are far above what any parser overflows at,
// and below what int64 holds.
func parseChunkSize(line []byte) (uint64, error) {
	var size uint64
	digits := 0
	for digits < len(line) && hexDigit(line[digits]) >= 0 {
		size = size<<4 | uint64(hexDigit(line[digits]))
		if digits++; digits > 15 {
			return 0, errors.New("the size of a chunk is too large")
		}
	}
	rest := line[digits:]
	if digits == 0 || len(rest) > 0 && rest[0] != ';' && rest[0] != ' ' && rest[0] != '\t' ||
		len(bytes.TrimLeft(rest, " \t")) > 0 && bytes.TrimLeft(rest, " \t")[0] != ';' || control(rest) {
		return 0, errors.New("the size of a chunk is not a hexadecimal number")
	}
	return size, nil
}

func hexDigit(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c|0x20 && c|0x20 <= 'f':
		return int(c|0x20-'a') + 10
	}
	return -1
}
