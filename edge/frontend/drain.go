package frontend

import (
	"crypto/tls"
	"crypto/x509"
	"time"
)

// maxGrace bounds how long a drain leaves keep-alive connections open. In that
// time those that are busy end with a "Connection: close", and a request that is
// just being sent is still served.
const maxGrace = 250 * time.Millisecond

// drain has the clients of all connections leave that are open now, and closes in
// the background what is left after timeout.
func (s *slot) drain(timeout time.Duration) {
	conns := s.connections()
	for _, c := range conns {
		c.leave(false)
	}
	s.frontend.spawn("clients left", func() {
		end := time.Now().Add(timeout)
		if conns = outlast(conns, min(timeout/4, maxGrace)); len(conns) == 0 {
			return
		}
		for _, c := range conns {
			c.leave(true)
		}
		if conns = outlast(conns, time.Until(end)); len(conns) > 0 {
			s.frontend.cfg.Logger.Warn("closing connections that outlasted the drain", "listener", s.name, "connections", len(conns))
			abort(conns)
		}
	})
}

// outlast waits for the ends of connections up to d, and returns those that are
// left.
func outlast(conns []*clientConn, d time.Duration) []*clientConn {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for i, c := range conns {
		select {
		case <-c.gone:
		case <-timer.C:
			return stillOpen(conns[i:])
		}
	}
	return nil
}

func stillOpen(conns []*clientConn) (open []*clientConn) {
	for _, c := range conns {
		select {
		case <-c.gone:
		default:
			open = append(open, c)
		}
	}
	return open
}

// abort ends connections, and waits for that.
func abort(conns []*clientConn) {
	for _, c := range conns {
		c.abort()
	}
	for _, c := range conns {
		<-c.gone
	}
}

// dismiss has clients leave whose certificate the listener's policy no longer
// takes: the requests that they have open may end within timeouts.drain, further
// ones are refused, and what is open then is closed. Connections that a new
// handshake would let in are left alone. It ends when they have.
func (s *slot) dismiss(policy *state) {
	var dismissed []*clientConn
	for _, c := range s.connections() {
		if c.accepted(policy.TLS) {
			continue
		}
		dismissed = append(dismissed, c)
		c.dismissed.Store(true)
		c.leave(true)
	}
	if len(dismissed) == 0 {
		return
	}
	s.frontend.cfg.Logger.Info("clients whose certificate the new policy refuses must leave", "listener", s.name, "connections", len(dismissed))
	abort(outlast(dismissed, policy.Spec.GetTimeouts().GetDrain().AsDuration()))
}

// accepted reports whether a handshake under cfg would let the client in. One whose
// handshake is under way looks at its end (completed).
func (c *clientConn) accepted(cfg *tls.Config) bool {
	c.mu.Lock()
	conn := c.tls
	c.mu.Unlock()
	return conn == nil || accepts(cfg, conn.ConnectionState())
}

// completed notes the end of the handshake. It reports false when the policy has
// changed since the hello and the new one refuses the client.
func (c *clientConn) completed(conn *tls.Conn, shown tls.ConnectionState) bool {
	c.mu.Lock()
	c.tls = conn
	c.mu.Unlock()
	// A change that comes after this sees the connection, one before is seen here.
	now := c.slot.state.Load()
	return now.PolicyKey == c.policyKey || accepts(now.TLS, shown)
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
