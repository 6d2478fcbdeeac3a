package interop

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/reseal/reseal/integration/peers"
)

// rawServer is a TLS server each of whose connections is played by a function.
// When that returns, nothing more is read or written, and the connection stays as
// it is until the test's end.
type rawServer struct {
	config  *tls.Config
	play    func(*rawConn)
	running sync.WaitGroup

	mu    sync.Mutex
	conns []net.Conn
}

// rawServe starts one. alpn is what it agrees to.
func (s *site) rawServe(t *testing.T, alpn string, play func(*rawConn)) *peers.Backend {
	t.Helper()
	pair, err := s.Authority.Issue(peers.ServerName)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := pair.TLS()
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &rawServer{config: &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{alpn}}, play: play}
	server.running.Go(func() { server.accept(listener) })
	t.Cleanup(func() {
		listener.Close()
		server.mu.Lock()
		for _, conn := range server.conns {
			conn.Close()
		}
		server.mu.Unlock()
		server.running.Wait()
	})
	return &peers.Backend{Name: "raw", Address: listener.Addr().String()}
}

func (s *rawServer) accept(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.conns = append(s.conns, conn)
		s.mu.Unlock()
		s.running.Go(func() {
			c := &rawConn{tcp: conn.(*net.TCPConn), config: s.config}
			s.play(c)
		})
	}
}

// rawConn is a connection as a server has it, or a client, to speak badly on.
// Errors are ignored: they show at the other side.
type rawConn struct {
	tcp    *net.TCPConn
	config *tls.Config

	*tls.Conn
	reader *bufio.Reader

	framer *http2.Framer
	fields bytes.Buffer
	coder  *hpack.Encoder
	reads  *hpack.Decoder
}

// handshake makes it a TLS connection.
func (c *rawConn) handshake() *rawConn {
	c.Conn = tls.Server(c.tcp, c.config)
	_ = c.Conn.Handshake()
	c.reader = bufio.NewReader(c.Conn)
	return c
}

// say writes text, with CRLF for LF.
func (c *rawConn) say(text string) {
	_, _ = io.WriteString(c.Conn, strings.ReplaceAll(text, "\n", "\r\n"))
}

// request reads the head of a request, and says whether one came.
func (c *rawConn) request() (*http.Request, bool) {
	request, err := http.ReadRequest(c.reader)
	return request, err == nil
}

// h2 prepares the connection for frames.
func (c *rawConn) h2() *rawConn {
	c.framer = http2.NewFramer(c.Conn, c.reader)
	c.coder = hpack.NewEncoder(&c.fields)
	c.reads = hpack.NewDecoder(4096, nil)
	return c
}

// h2Server reads the preface and sends settings.
func (c *rawConn) h2Server(settings ...http2.Setting) *rawConn {
	c.handshake().h2()
	_, _ = io.CopyN(io.Discard, c.reader, int64(len(http2.ClientPreface)))
	_ = c.framer.WriteSettings(settings...)
	return c
}

// until reads frames, and acknowledges settings and pings, up to one that stop
// picks. It says whether that came.
func (c *rawConn) until(stop func(http2.Frame) bool) bool {
	for {
		frame, err := c.framer.ReadFrame()
		if err != nil {
			return false
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				_ = c.framer.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				_ = c.framer.WritePing(true, f.Data)
			}
		}
		if stop(frame) {
			return true
		}
	}
}

// headers picks the header of a message.
func headers(f http2.Frame) bool { return f.Header().Type == http2.FrameHeaders }

// path is that of a request, all of which must be in one frame. Those of a
// connection must be read in turn.
func (c *rawConn) path(h *http2.HeadersFrame) string {
	fields, _ := c.reads.DecodeFull(h.HeaderBlockFragment())
	for _, field := range fields {
		if field.Name == ":path" {
			return field.Value
		}
	}
	return ""
}

// block is a compressed header of names and values in turn.
func (c *rawConn) block(fields ...string) []byte {
	c.fields.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = c.coder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return bytes.Clone(c.fields.Bytes())
}

// head sends a whole header, on which more may follow.
func (c *rawConn) head(stream uint32, fields ...string) {
	_ = c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: c.block(fields...), EndHeaders: true})
}

// answer answers a request in full.
func (c *rawConn) answer(stream uint32, body []byte) {
	c.head(stream, ":status", "200")
	for len(body) > 16384 {
		_ = c.framer.WriteData(stream, false, body[:16384])
		body = body[16384:]
	}
	_ = c.framer.WriteData(stream, true, body)
}
