package trust

import (
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// Credentials are ServerTLS as credentials of a gRPC server, whose connections
// end when the client's certificate does: TLS itself looks at the expiry only in
// the handshake, and connections live for long. Clients connect again, with
// their newest certificate.
func (t *Trust) Credentials() credentials.TransportCredentials {
	return expiring{credentials.NewTLS(t.ServerTLS())}
}

type expiring struct {
	credentials.TransportCredentials
}

func (e expiring) Clone() credentials.TransportCredentials {
	return expiring{e.TransportCredentials.Clone()}
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
	left := time.Until(info.State.PeerCertificates[0].NotAfter)
	return &expiringConn{Conn: conn, timer: time.AfterFunc(left, func() { _ = conn.Close() })}, auth, nil
}

type expiringConn struct {
	net.Conn
	timer *time.Timer
	once  sync.Once
	err   error
}

func (c *expiringConn) Close() error {
	c.once.Do(func() {
		c.timer.Stop()
		c.err = c.Conn.Close()
	})
	return c.err
}
