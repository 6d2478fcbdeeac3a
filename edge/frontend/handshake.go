package frontend

import (
	"crypto/tls"
	"errors"
	"io"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// serve makes the handshake of a connection and passes it on. The handshake is
// made here, not in http.Server, so that each is counted once, with its outcome.
func (s *slot) serve(c *clientConn) {
	st := s.state.Load()
	bound := st.Spec.GetTimeouts().GetHandshake().AsDuration()
	if !s.readProxyHeader(c, st, bound) {
		_ = c.Close()
		return
	}
	_ = c.SetDeadline(time.Now().Add(bound)) // fails only on a closed connection
	start := time.Now()
	conn := tls.Server(c, s.hello)
	if err := conn.Handshake(); err != nil {
		s.handshakeFailed(c, err, time.Since(start))
		_ = c.Close()
		return
	}
	_ = c.SetDeadline(time.Time{}) // likewise
	allowed := c.completed(conn)
	c.tickets.count(s.counters, c.tls, time.Since(start))
	c.sni, _ = exchange.HostName(c.tls.ServerName)
	c.certificate = newClientCertificate(c.tls)
	if !allowed {
		_ = conn.Close()
		return
	}
	s.pass(c, conn)
}

// configForClient implements tls.Config.GetConfigForClient: what a client gets
// is what is in force when it says hello, however long it waited with that.
func (s *slot) configForClient(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	c, st := hello.Conn.(*clientConn), s.state.Load()
	c.tickets, c.policyKey = st.tickets.handshake(), st.PolicyKey
	return c.tickets.config(st.TLS, hello), nil
}

// readProxyHeader reads the PROXY header of a connection that must have one.
// From elsewhere it is not a header: those bytes then fail the handshake.
func (s *slot) readProxyHeader(c *clientConn, st *state, bound time.Duration) bool {
	if !contains(st.proxies, c.source.Addr()) {
		return true
	}
	proxied := proxyproto.NewConn(c.Conn, proxyproto.WithPolicy(proxyproto.REQUIRE), proxyproto.SetReadHeaderTimeout(bound))
	if proxied.ProxyHeader() == nil {
		s.counters.Error("proxy_protocol")
		s.frontend.cfg.Logger.Warn("no valid PROXY header from a peer that must send one", "listener", s.name, "peer", c.source.String())
		return false
	}
	c.Conn = proxied
	c.addressed(proxied.RemoteAddr(), proxied.LocalAddr())
	return true
}

func (s *slot) handshakeFailed(c *clientConn, err error, d time.Duration) {
	var timeout interface{ Timeout() bool }
	if !c.received.Load() && !(errors.As(err, &timeout) && timeout.Timeout()) {
		return // a connection without a byte, as health checks of TCP make: no handshake
	}
	s.counters.HandshakeFailed(d)
	s.frontend.cfg.Logger.Debug("handshake failed", "listener", s.name, "peer", c.source.String(), "error", err)
	var header tls.RecordHeaderError
	if errors.As(err, &header) && header.Conn != nil && looksLikeHTTP(header.RecordHeader) {
		_, _ = io.WriteString(header.Conn, plainHTTPAnswer) // best effort for a person
	}
}

const plainHTTPAnswer = "HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n" +
	ReasonHeader + ": plain_http\r\nConnection: close\r\n\r\n400 Bad Request: plain_http\n"

func looksLikeHTTP(header [5]byte) bool {
	switch string(header[:]) {
	case "GET /", "HEAD ", "POST ", "PUT /", "OPTIO", "PATCH", "DELET", "CONNE":
		return true
	}
	return false
}

// pass hands a connection to what serves its protocol.
func (s *slot) pass(c *clientConn, conn *tls.Conn) {
	for {
		g := c.generation.Load()
		if g.server == nil {
			s.tunnel(c, conn)
			return
		}
		if g.deliver(conn) {
			return
		}
		// The generation retired during the handshake.
		g.remove(c)
		if _, ok := s.join(c); !ok {
			_ = conn.Close()
			return
		}
	}
}

// mechanismOf is how a resumed handshake was resumed.
func mechanismOf(version uint16) resealv1.Mechanism {
	if version >= tls.VersionTLS13 {
		return resealv1.Mechanism_MECHANISM_PSK
	}
	return resealv1.Mechanism_MECHANISM_TICKET
}
