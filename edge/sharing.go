package edge

import (
	"crypto/tls"
	"time"

	"google.golang.org/grpc"

	"github.com/reseal/reseal/edge/backend"
	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/share"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// shareWait bounds how long a configuration with new pools waits for sessions of
// other edges. Without them backends pay for full handshakes, no more.
const shareWait = 2 * time.Second

func (e *Edge) newShare(conn *grpc.ClientConn) {
	e.share = share.New(share.Config{
		Edge:        e.cfg.ID,
		BootID:      e.bootID,
		Labels:      e.cfg.Labels,
		Client:      resealv1.NewSessionServiceClient(conn),
		Credentials: e.identity.Credentials,
		Sessions:    e.sessions,
		Logger:      e.cfg.Logger.With("part", "share"),
	})
}

// shareSessions tells which pools share their sessions. For new ones it waits for
// what other edges hold: once the pools are in force their health checks connect
// at once.
func (e *Edge) shareSessions(pools []exchange.Pool) {
	e.share.Update(sharedPools(pools))
	wait := time.NewTimer(shareWait)
	defer wait.Stop()
	select {
	case <-e.share.Ready():
	case <-wait.C:
	}
}

func sharedPools(pools []exchange.Pool) []share.Pool {
	var shared []share.Pool
	for _, pool := range pools {
		sessions := pool.Spec.GetSessions()
		if sessions.GetSharing() == resealv1.Sessions_SHARING_FLEET && sessions.GetMode() != resealv1.Sessions_MODE_OFF {
			shared = append(shared, share.Pool{
				Name:  pool.Name,
				Group: pool.Identity,
				TLS:   func(identity exchange.Identity) *tls.Config { return backend.SessionConfig(pool, identity) },
			})
		}
	}
	return shared
}
