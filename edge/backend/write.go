package backend

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/net/http/httpguts"

	"github.com/reseal/reseal/edge/exchange"
)

// smallBody is the size up to which a request body of known length is read
// before a connection is taken. It then goes out with the head in one write,
// and can be sent again.
const smallBody = 16 << 10

// requestBody is what a request sends, once per attempt.
type requestBody struct {
	small   []byte  // the whole body, when it is small
	stream  *replay // otherwise; nil if there is none
	length  int64   // of stream; -1 is unknown
	trailer bool
}

// newRequestBody looks at req and reads a small body.
func newRequestBody(req *http.Request) (*requestBody, error) {
	b := &requestBody{trailer: len(req.Trailer) > 0}
	if req.Body == nil || req.Body == http.NoBody {
		return b, nil
	}
	b.stream, b.length = newReplay(req.Body), req.ContentLength
	if b.length == 0 {
		b.length = -1 // as http.Request says of a client's request
	}
	if b.length < 0 || b.length > smallBody || b.trailer || expectsContinue(req) {
		return b, nil
	}
	small := make([]byte, b.length)
	_, err := io.ReadFull(req.Body, small)
	req.Body.Close()
	b.stream = nil
	if err != nil {
		return b, fmt.Errorf("read the request's body: %w", err)
	}
	b.small = small
	return b, nil
}

func expectsContinue(req *http.Request) bool {
	return httpguts.HeaderValuesContainsToken(req.Header["Expect"], "100-continue")
}

// replayable reports whether next can be called.
func (b *requestBody) replayable() bool { return b.stream == nil || b.stream.whole() }

// next returns the stream for an attempt, nil if the body is not a stream.
func (b *requestBody) next() io.ReadCloser {
	if b.stream == nil {
		return nil
	}
	return b.stream.next()
}

// settle says that there will be no other attempt.
func (b *requestBody) settle() {
	if b.stream != nil {
		b.stream.settle()
	}
}

// discard closes the body of a request that failed.
func (b *requestBody) discard() {
	if b.stream != nil {
		b.stream.close()
	}
}

// checkRequest refuses what could change the meaning of a request on the wire
// (RFC 9112 section 11.1, RFC 9113 section 10.3).
func checkRequest(req *http.Request) error {
	if req.URL == nil {
		return errors.New("no URL")
	}
	if !httpguts.ValidHeaderFieldName(req.Method) { // a method is a token too
		return fmt.Errorf("method %q is not a token", req.Method)
	}
	if host := req.Host; host == "" || !httpguts.ValidHostHeader(host) {
		return fmt.Errorf("host %q is not valid", host)
	}
	if uri := targetOf(req); !validURI(uri) {
		return fmt.Errorf("request target %q is not valid", uri)
	}
	return errors.Join(checkFields("header", req.Header), checkFields("trailer", req.Trailer))
}

func checkFields(what string, fields http.Header) error {
	for name, values := range fields {
		if !httpguts.ValidHeaderFieldName(name) {
			return fmt.Errorf("%s name %q is not a token", what, name)
		}
		for _, value := range values {
			if !httpguts.ValidHeaderFieldValue(value) {
				return fmt.Errorf("%s %s holds a control character", what, name)
			}
		}
	}
	return nil
}

func validURI(uri string) bool {
	if uri == "" {
		return false
	}
	for i := range len(uri) {
		if uri[i] <= ' ' || uri[i] == 0x7f {
			return false
		}
	}
	return true
}

// targetOf is the request target. A caller that has one as it came puts it into
// RequestURI.
func targetOf(req *http.Request) string {
	if req.RequestURI != "" {
		return req.RequestURI
	}
	return req.URL.RequestURI()
}

// wantsUpgrade returns the protocol that a request wants to switch to, or "".
func wantsUpgrade(req *http.Request) string {
	if len(req.Header["Upgrade"]) == 0 || !httpguts.HeaderValuesContainsToken(req.Header["Connection"], "upgrade") {
		return ""
	}
	return req.Header.Get("Upgrade")
}

// framing headers are written by appendHead alone.
func ownHeader(name string) bool {
	switch name {
	case "Host", "Content-Length", "Transfer-Encoding", "Trailer", "Connection", "Keep-Alive", "Proxy-Connection":
		return true
	}
	return false
}

// appendHead appends the head of req in HTTP/1.1 (RFC 9112). req has passed
// checkRequest.
func appendHead(buf []byte, req *http.Request, body *requestBody, names map[string]string) []byte {
	buf = append(buf, req.Method...)
	buf = append(buf, ' ')
	buf = append(buf, targetOf(req)...)
	buf = append(buf, " HTTP/1.1\r\nHost: "...)
	buf = append(buf, req.Host...)
	buf = append(buf, "\r\n"...)
	upgrade := wantsUpgrade(req) != ""
	if upgrade {
		buf = append(buf, "Connection: Upgrade\r\n"...)
	}
	for name, values := range req.Header {
		if ownHeader(name) || name == "Upgrade" && !upgrade {
			continue
		}
		if written := names[name]; written != "" {
			name = written
		}
		for _, value := range values {
			buf = appendField(buf, name, value)
		}
	}
	buf = appendFraming(buf, req, body)
	return append(buf, "\r\n"...)
}

func appendField(buf []byte, name, value string) []byte {
	buf = append(buf, name...)
	buf = append(buf, ": "...)
	buf = append(buf, value...)
	return append(buf, "\r\n"...)
}

// appendFraming says how long the body is.
func appendFraming(buf []byte, req *http.Request, body *requestBody) []byte {
	switch {
	case body.small != nil:
		return appendLength(buf, int64(len(body.small)))
	case body.stream == nil:
		if req.Method == http.MethodPost || req.Method == http.MethodPut || req.Method == http.MethodPatch {
			return appendLength(buf, 0)
		}
		return buf
	case !body.chunked():
		return appendLength(buf, body.length)
	}
	buf = append(buf, "Transfer-Encoding: chunked\r\n"...)
	if body.trailer {
		var names []string
		for name := range req.Trailer {
			if exchange.TrailerAllowed(name) {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		buf = appendField(buf, "Trailer", strings.Join(names, ", "))
	}
	return buf
}

func appendLength(buf []byte, n int64) []byte {
	buf = append(buf, "Content-Length: "...)
	buf = strconv.AppendInt(buf, n, 10)
	return append(buf, "\r\n"...)
}

// chunked reports whether the stream goes in chunks: when its length is not
// known, or trailers follow.
func (b *requestBody) chunked() bool { return b.length < 0 || b.trailer }

// headBuffers hold a head, with a small body behind it.
var headBuffers = sync.Pool{New: func() any { b := make([]byte, 0, 4<<10); return &b }}

// copyBuffers carry streams. The room before and after the data is for a
// chunk's frame, so that a chunk is one write.
var copyBuffers = sync.Pool{New: func() any { return new([copyFront + copySize + 2]byte) }}

const (
	copySize  = 32 << 10
	copyFront = len("ffffffff\r\n")
)

// readError marks a failure of the body's reader, which is the client's.
type readError struct{ error }

func (e readError) Unwrap() error { return e.error }

// streamWriter sends a stream with the framing that appendFraming announced.
type streamWriter struct {
	w       io.Writer
	stream  io.Reader
	body    *requestBody
	trailer func() http.Header // asked for after the stream's end
	touch   func()             // a byte has moved
	last    func()             // the last Write is about to begin
}

// run sends all. Errors of the stream are readErrors.
func (s *streamWriter) run() error {
	buf := copyBuffers.Get().(*[copyFront + copySize + 2]byte)
	defer copyBuffers.Put(buf)
	left, chunked := s.body.length, s.body.chunked()
	for {
		n, err := s.stream.Read(buf[copyFront : copyFront+copySize])
		s.touch()
		if left -= int64(n); s.body.length >= 0 && left < 0 {
			return readError{errLongBody}
		}
		ends := !chunked && left == 0
		if ends {
			s.last()
		}
		if n > 0 {
			if werr := writePart(s.w, buf, n, chunked); werr != nil {
				return werr
			}
			s.touch()
		}
		switch {
		case ends:
			return nil
		case err == nil:
		case !errors.Is(err, io.EOF):
			return readError{err}
		case s.body.length >= 0 && left != 0:
			return readError{errShortBody}
		default:
			s.last()
			return writeLastChunk(s.w, s.trailer())
		}
	}
}

// writePart sends n bytes that begin at copyFront.
func writePart(w io.Writer, buf *[copyFront + copySize + 2]byte, n int, chunked bool) error {
	from, to := copyFront, copyFront+n
	if chunked {
		var size [copyFront]byte
		head := append(strconv.AppendInt(size[:0], int64(n), 16), '\r', '\n')
		from -= len(head)
		copy(buf[from:], head)
		to += copy(buf[to:], "\r\n")
	}
	_, err := w.Write(buf[from:to])
	return err
}

func writeLastChunk(w io.Writer, trailer http.Header) error {
	var last bytes.Buffer
	last.WriteString("0\r\n")
	if err := checkFields("trailer", trailer); err != nil {
		return readError{err}
	}
	for name, values := range trailer {
		if !exchange.TrailerAllowed(name) {
			continue
		}
		for _, value := range values {
			last.Write(appendField(nil, name, value))
		}
	}
	last.WriteString("\r\n")
	_, err := w.Write(last.Bytes())
	return err
}
