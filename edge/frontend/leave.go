package frontend

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"time"

	"golang.org/x/net/http2"
)

// Clients whose certificate the listener's policy no longer takes must leave:
// the requests that they have open may end within timeouts.drain, further ones
// are refused, and what is open then is closed. Connections that a new handshake
// would let in are left alone.

// errLeave has an HTTP/2 server send GOAWAY and end the connection in order.
const errLeave = http2.ConnectionError(http2.ErrCodeNo)

// dismiss has those clients leave, and ends when they have.
func (s *slot) dismiss(policy *state) {
	var leaving []*clientConn
	for _, c := range s.connections() {
		if shown, ok := c.handshaken(); ok && !accepts(policy.TLS, shown) {
			leaving = append(leaving, c)
			c.leave()
		}
	}
	if len(leaving) == 0 {
		return
	}
	s.frontend.cfg.Logger.Info("clients whose certificate the new policy refuses must leave", "listener", s.name, "connections", len(leaving))
	timer := time.NewTimer(policy.Spec.GetTimeouts().GetDrain().AsDuration())
	defer timer.Stop()
	for i, c := range leaving {
		select {
		case <-c.gone:
		case <-timer.C:
			abort(leaving[i:])
			return
		}
	}
}

// connections are all that are open.
func (s *slot) connections() []*clientConn {
	s.mu.Lock()
	generations := []*generation{s.current}
	for g := range s.retired {
		generations = append(generations, g)
	}
	s.mu.Unlock()
	var all []*clientConn
	for _, g := range generations {
		if g != nil {
			all = append(all, g.connections()...)
		}
	}
	return all
}

// accepts reports whether a handshake under cfg would take what a client has
// shown before. It checks as crypto/tls does.
func accepts(cfg *tls.Config, shown tls.ConnectionState) bool {
	if cfg.ClientAuth < tls.VerifyClientCertIfGiven {
		return true // it would not be asked, or not be verified
	}
	if len(shown.PeerCertificates) == 0 {
		return cfg.ClientAuth != tls.RequireAndVerifyClientCert
	}
	intermediates := x509.NewCertPool()
	for _, certificate := range shown.PeerCertificates[1:] {
		intermediates.AddCert(certificate)
	}
	chains, err := shown.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots: cfg.ClientCAs, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return false
	}
	shown.VerifiedChains = chains
	return cfg.VerifyConnection == nil || cfg.VerifyConnection(shown) == nil
}

// completed notes the end of the handshake. It reports false when the policy has
// changed since the hello and the new one refuses the client.
func (c *clientConn) completed(conn *tls.Conn) bool {
	shown := conn.ConnectionState()
	c.mu.Lock()
	c.tls, c.conn = shown, conn
	c.mu.Unlock()
	// A change that comes after this sees the connection, one before is seen here.
	now := c.slot.state.Load()
	return now.PolicyKey == c.policyKey || accepts(now.TLS, shown)
}

// handshaken returns what the client showed, once the handshake is complete.
func (c *clientConn) handshaken() (tls.ConnectionState, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tls, c.conn != nil
}

// leave asks the client to leave. One without a request is seen out at once.
func (c *clientConn) leave() {
	c.mu.Lock()
	c.leaving.Store(true)
	idle := !c.active && !c.closed
	c.mu.Unlock()
	if idle {
		c.seeOut()
	}
}

// seeOut ends a connection that has no request.
func (c *clientConn) seeOut() {
	if c.tls.NegotiatedProtocol == http2.NextProtoTLS {
		_ = c.tcp.SetReadDeadline(time.Unix(1, 0)) // its Read then returns errLeave
		return
	}
	c.slot.frontend.work.Go(func() { _ = c.conn.Close() }) // may wait for the client to take close_notify
}

// leaves reports whether a Read has ended, or need not begin, because an HTTP/2
// client must leave and has no request.
func (c *clientConn) leaves(err error) bool {
	if !c.leaving.Load() || err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.active
}
