package frontend

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// h2Raw is an HTTP/2 client that sends what it likes.
type h2Raw struct {
	t testing.TB
	*http2.Framer
	conn   *tls.Conn
	path   string
	block  bytes.Buffer
	encode *hpack.Encoder
}

// h2Dial opens a connection to the listener "main" and sends preface and empty
// settings.
func (e *edge) h2Dial(change ...func(*tls.Config)) *h2Raw {
	e.t.Helper()
	return e.h2DialWith(nil, change...)
}

// h2DialWith is h2Dial with settings.
func (e *edge) h2DialWith(settings []http2.Setting, change ...func(*tls.Config)) *h2Raw {
	e.t.Helper()
	conn := e.dial(append(change, func(cfg *tls.Config) { cfg.NextProtos = []string{"h2"} })...)
	_ = conn.SetDeadline(time.Now().Add(12 * patience)) // for many frames on a busy machine
	h := &h2Raw{t: e.t, Framer: http2.NewFramer(conn, conn), conn: conn, path: "/"}
	h.encode = hpack.NewEncoder(&h.block)
	h.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		e.t.Fatal(err)
	}
	if err := h.WriteSettings(settings...); err != nil {
		e.t.Fatal(err)
	}
	return h
}

// fields encodes a request's header.
func (h *h2Raw) fields(method string, more ...string) []byte {
	h.block.Reset()
	fields := append([]string{":method", method, ":scheme", "https", ":authority", "app.test", ":path", h.path}, more...)
	for i := 0; i < len(fields); i += 2 {
		_ = h.encode.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return h.block.Bytes()
}

// request sends a request's header; more are names and values of fields.
func (h *h2Raw) request(stream uint32, method string, end bool, more ...string) error {
	block := h.fields(method, more...)
	first := block[:min(len(block), 16<<10)]
	block = block[len(first):]
	err := h.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: first, EndStream: end, EndHeaders: len(block) == 0})
	for err == nil && len(block) > 0 {
		part := block[:min(len(block), 16<<10)]
		block = block[len(part):]
		err = h.WriteContinuation(stream, len(block) == 0, part)
	}
	return err
}

// h2End is how a connection ended.
type h2End struct {
	goAway  bool
	code    http2.ErrCode
	answers map[uint32]string // status by stream
	resets  map[uint32]http2.ErrCode
	err     error
}

// read reads until the connection ends or until says so.
func (h *h2Raw) read(until func(end *h2End) bool) *h2End {
	end := &h2End{answers: map[uint32]string{}, resets: map[uint32]http2.ErrCode{}}
	_ = h.conn.SetReadDeadline(time.Now().Add(12 * patience))
	for until == nil || !until(end) {
		f, err := h.ReadFrame()
		if err != nil {
			end.err = err
			return end
		}
		switch f := f.(type) {
		case *http2.GoAwayFrame:
			end.goAway, end.code = true, f.ErrCode
		case *http2.MetaHeadersFrame:
			end.answers[f.StreamID] = f.PseudoValue("status")
		case *http2.RSTStreamFrame:
			end.resets[f.StreamID] = f.ErrCode
		}
	}
	return end
}

// ping reports whether the connection lives.
func (h *h2Raw) ping() error {
	data := [8]byte{'a', 'l', 'i', 'v', 'e'}
	if err := h.WritePing(false, data); err != nil {
		return err
	}
	_ = h.conn.SetReadDeadline(time.Now().Add(2 * patience))
	for {
		f, err := h.ReadFrame()
		if err != nil {
			return err
		}
		switch f := f.(type) {
		case *http2.PingFrame:
			if f.IsAck() && f.Data == data {
				return nil
			}
		case *http2.GoAwayFrame:
			return fmt.Errorf("GOAWAY %v", f.ErrCode)
		}
	}
}
