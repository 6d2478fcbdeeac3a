package frontend

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/netip"
	"syscall"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// clientKey is the context key of a handshake's *clientConn.
type clientKey struct{}

// serve makes the handshake of a connection and passes it on to a loop.
func (s *slot) serve(c *clientConn) {
	st := s.state.Load()
	bound := st.Spec.GetTimeouts().GetHandshake().AsDuration()
	wire := loop.NewWire(c.tcp)
	if !s.readProxyHeader(c, wire, st, bound) {
		_ = c.tcp.Close()
		c.over(false)
		return
	}
	var conn *tls.Conn
	var start time.Time
	err := s.handshakes.Load().Do(wire, sourceOf(c.source.Addr()), func() error {
		start = time.Now()
		_ = c.tcp.SetDeadline(start.Add(bound)) // fails only on a closed connection
		conn = tls.Server(wire, s.hello)
		return conn.HandshakeContext(context.WithValue(context.Background(), clientKey{}, c))
	})
	if err != nil {
		if conn != nil || wire.Ahead() > 0 || isTimeout(err) { // else no byte came, as from health checks of TCP
			s.handshakeFailed(c, err, start)
		}
		_ = c.tcp.Close()
		c.over(errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, loop.ErrLeft))
		return
	}
	_ = c.tcp.SetDeadline(time.Time{}) // likewise
	if s.completed(c, conn, time.Since(start)) {
		c.join(wire, conn)
		return
	}
	_ = conn.Close()
	c.over(false)
}

// completed notes what the handshake has brought. It reports false when the policy
// that is now in force refuses the client.
func (s *slot) completed(c *clientConn, conn *tls.Conn, took time.Duration) bool {
	shown := conn.ConnectionState()
	allowed := c.completed(conn, shown)
	c.miss = c.tickets.count(s.counters, shown, took)
	c.tickets = nil
	c.protocol, c.version, c.resumed = shown.NegotiatedProtocol, shown.Version, shown.DidResume
	c.serverName = shown.ServerName
	c.sni, _ = exchange.HostName(shown.ServerName)
	c.certificate = newClientCertificate(shown)
	return allowed
}

// sourceOf is whom others are not to suffer from: an address, or a network of IPv6
// that one client has alone.
func sourceOf(address netip.Addr) netip.Addr {
	if address.Is4() {
		return address
	}
	network, err := address.WithZone("").Prefix(64)
	if err != nil {
		return address
	}
	return network.Addr()
}

// configForClient implements tls.Config.GetConfigForClient: what a client gets
// is what is in force when it says hello, however long it waited with that.
func (s *slot) configForClient(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	c, st := hello.Context().Value(clientKey{}).(*clientConn), s.state.Load()
	c.tickets, c.policyKey = st.tickets.handshake(), st.PolicyKey
	return c.tickets.config(st.TLS, hello), nil
}

// limitHandshakes bounds the handshakes that are begun from now on.
func (s *slot) limitHandshakes(before, next *state) {
	most, bound := next.Spec.GetLimits().GetMaxHandshakes(), next.Spec.GetTimeouts().GetHandshake().AsDuration()
	if before != nil && before.Spec.GetLimits().GetMaxHandshakes() == most &&
		before.Spec.GetTimeouts().GetHandshake().AsDuration() == bound {
		return
	}
	s.handshakes.Store(loop.NewHandshakes(loop.HandshakesConfig{
		Computing: int(most),
		HelloTime: bound,
		Ours: func(ticket []byte) bool {
			st := s.state.Load()
			return !st.TLS.SessionTicketsDisabled && st.tickets.keys.ours(ticket)
		},
		Wait:    func(delta int) { s.counters.Add(exchange.HandshakesWaiting.At(), int64(delta)) },
		Waited:  func(time.Duration) { s.counters.Add(exchange.HandshakesWaited.At(), 1) },
		Refused: func() { s.counters.Add(exchange.HandshakesRefused.At(), 1) },
		Crowded: s.gate.crowd,
	}))
}

// readProxyHeader reads the PROXY header of a connection that must have one.
// From elsewhere it is not a header: those bytes then fail the handshake.
func (s *slot) readProxyHeader(c *clientConn, wire *loop.Wire, st *state, bound time.Duration) bool {
	if !contains(st.proxies, c.source.Addr()) {
		return true
	}
	_ = c.tcp.SetReadDeadline(time.Now().Add(bound)) // fails only on a closed connection
	reader := bufio.NewReader(c.tcp)
	header, err := proxyproto.Read(reader)
	if err != nil {
		s.counters.Error("proxy_protocol")
		s.frontend.cfg.Logger.Warn("no valid PROXY header from a peer that must send one", "listener", s.name, "peer", c.source.String(), "error", err)
		return false
	}
	rest, _ := reader.Peek(reader.Buffered())
	wire.Unread(rest)
	if !header.Command.IsLocal() {
		c.addressed(header.SourceAddr, header.DestinationAddr)
	}
	return true
}

func isTimeout(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.As(err, &timeout) && timeout.Timeout()
}

// handshakeFailed counts one that has not been completed, whenever it began.
func (s *slot) handshakeFailed(c *clientConn, err error, start time.Time) {
	var took time.Duration
	if !start.IsZero() {
		took = time.Since(start)
	}
	s.counters.HandshakeFailed(took)
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

// mechanismOf is how a resumed handshake was resumed.
func mechanismOf(version uint16) resealv1.Mechanism {
	if version >= tls.VersionTLS13 {
		return resealv1.Mechanism_MECHANISM_PSK
	}
	return resealv1.Mechanism_MECHANISM_TICKET
}
