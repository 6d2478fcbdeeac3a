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
// strictly as heads are followed. It keeps no bytes: what it has not dealt
// with is passed again with more behind it.
type Body struct {
	step step
	seen int    // bytes of an unfinished line or trailer section, searched for its end
	left uint64 // of a body of known length, or of a chunk's data
	idle int64  // bytes of chunks beyond what their data may cost
}

type step int8

const (
	bodyOver step = iota
	bodyBytes
	bodyToClose
	chunkSize
	chunkData
	chunkEnd
	chunkTrailer
)

const (
	// maxChunkLine bounds a chunk's size with its extensions.
	maxChunkLine = 4 << 10
	// maxIdle bounds the bytes of chunks that are neither data nor what goes with
	// any chunk, in all: extensions may not become a body of their own.
	maxIdle = 16 << 10
)

// NewBody follows the body that a head announces; one without a length has none.
func NewBody(framing Framing) Body {
	switch {
	case framing.Chunked:
		return Body{step: chunkSize}
	case framing.Length > 0:
		return Body{step: bodyBytes, left: uint64(framing.Length)}
	}
	return Body{}
}

// BodyToClose follows a body that ends with its connection.
func BodyToClose() Body { return Body{step: bodyToClose} }

// Over reports whether the body has ended.
func (b *Body) Over() bool { return b.step == bodyOver }

// ToClose reports whether the body ends with its connection.
func (b *Body) ToClose() bool { return b.step == bodyToClose }

// AtTrailer reports whether a trailer section, which may be empty, comes next.
func (b *Body) AtTrailer() bool { return b.step == chunkTrailer }

// Next deals with n bytes of in, of which part, as far as it reaches, is content.
// Without part it needs more bytes, or the content has ended. Errors are
// FramingErrors; the bytes before are good.
func (b *Body) Next(in []byte) (n int, part []byte, err error) {
	for {
		switch b.step {
		case bodyBytes, bodyToClose, chunkData:
			size := len(in) - n
			if b.step != bodyToClose {
				size = int(min(uint64(size), b.left))
				if b.left -= uint64(size); b.left == 0 {
					b.step = after[b.step]
				}
			}
			return n + size, in[n : n+size : n+size], nil
		case chunkEnd:
			used, err := b.endChunk(in[n:])
			if err != nil || used == 0 {
				return n, nil, err
			}
			n += used
		case chunkSize:
			used, err := b.beginChunk(in[n:])
			if err != nil || used == 0 {
				return n, nil, err
			}
			n += used
		default:
			return n, nil, nil
		}
	}
}

// after is the step behind the last byte.
var after = [...]step{bodyBytes: bodyOver, chunkData: chunkEnd}

// endChunk takes the CRLF behind a chunk's data.
func (b *Body) endChunk(in []byte) (int, error) {
	switch {
	case len(in) > 0 && in[0] != '\r' || len(in) > 1 && in[1] != '\n':
		return 0, FramingError{errors.New("a chunk does not end, by CRLF, where its size says")}
	case len(in) < 2:
		return 0, nil
	}
	b.step = chunkSize
	return 2, nil
}

// beginChunk takes the line in front of a chunk's data. It returns 0 while the
// line has not ended.
func (b *Body) beginChunk(in []byte) (int, error) {
	lf := bytes.IndexByte(in[b.seen:], '\n')
	end := b.seen + lf + 1
	switch {
	case lf < 0 && len(in) < maxChunkLine:
		b.seen = len(in)
		return 0, nil
	case lf < 0 || end > maxChunkLine:
		return 0, FramingError{errors.New("the line of a chunk's size is longer than 4 KiB")}
	case end < 2 || in[end-2] != '\r':
		return 0, FramingError{ErrBareLF}
	}
	size, err := parseChunkSize(in[:end-2])
	if err != nil {
		return 0, FramingError{err}
	}
	// A chunk may cost 16 bytes, and twice its data, as it may for net/http.
	b.idle = max(0, b.idle+int64(end)-16-2*int64(size))
	if b.idle > maxIdle {
		return 0, FramingError{errors.New("the chunks are mostly extensions")}
	}
	b.seen, b.left, b.step = 0, size, chunkData
	if size == 0 {
		b.step = chunkTrailer
	}
	return end, nil
}

// Trailer takes the trailer section, of at most most bytes and lines lines, and
// returns of its fields those that may stand in one. It returns 0 while the
// section has not ended. Errors are FramingErrors.
func (b *Body) Trailer(in []byte, most, lines int) (n int, fields Fields, err error) {
	end, err := EndOfHead(in[:min(len(in), most)], b.seen)
	switch {
	case err != nil:
		return 0, nil, FramingError{err}
	case end == 0 && len(in) >= most, bytes.Count(in[:end], newline) > lines+1:
		return 0, nil, FramingError{errors.New("the trailer section is too large")}
	case end == 0:
		b.seen = len(in)
		return 0, nil, nil
	}
	for rest := string(in[:end-len("\r\n")]); rest != ""; {
		var field Field
		if field, rest, err = CutField(rest); err != nil {
			return 0, nil, FramingError{err}
		}
		if TrailerAllowed(field.Name) {
			fields = append(fields, field)
		}
	}
	b.step, b.seen = bodyOver, 0
	return end, fields, nil
}

var newline = []byte{'\n'}

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
	rest := string(line[digits:])
	if digits == 0 || TrimSpace(rest) != "" && rest[0] != ';' || !ValidValue(rest) {
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
