package trust

import (
	"crypto/x509"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// Credentials are ServerTLS as credentials of a gRPC server, whose connections
// end when the client's certificate does, or is revoked: TLS itself looks at the
// expiry only in the handshake, and connections live for long. Clients connect again,
// with their newest certificate.
func (t *Trust) Credentials() credentials.TransportCredentials {
	return expiring{credentials.NewTLS(t.ServerTLS()), t}
}

type expiring struct {
	credentials.TransportCredentials
	trust *Trust
}

func (e expiring) Clone() credentials.TransportCredentials {
	return expiring{e.TransportCredentials.Clone(), e.trust}
}

func (e expiring) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, auth, err := e.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	info, ok := auth.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return conn, auth, nil
	}
	certificate := info.State.PeerCertificates[0]
	left := time.Until(certificate.NotAfter)
	bound := &expiringConn{Conn: conn, timer: time.AfterFunc(left, func() { _ = conn.Close() })}
	e.trust.hold(bound, certificate)
	return bound, auth, nil
}

// hold has a connection end when the caller's identity is revoked. Whoever connects
// with one that was is told so by its first call.
func (t *Trust) hold(conn *expiringConn, certificate *x509.Certificate) {
	identity, err := t.identity(certificate)
	if err != nil {
		return // no call is admitted
	}
	who := caller{identity: identity, certificate: certificate}
	conn.forget = t.live.add(&holding{who: who, end: func(error) { time.AfterFunc(closeDelay, func() { _ = conn.Close() }) }})
	if t.refused(who) != nil {
		conn.timer.Reset(min(refusalTime, time.Until(certificate.NotAfter)))
	}
}

type expiringConn struct {
	net.Conn
	timer *time.Timer
	once  sync.Once
	err   error
	// forget takes it out of those that a revocation ends; nil: it is not there.
	forget func()
}

func (c *expiringConn) Close() error {
	c.once.Do(func() {
		c.timer.Stop()
		if c.forget != nil {
			c.forget()
		}
		c.err = c.Conn.Close()
	})
	return c.err
}
