package backend

import (
	"slices"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// settings is a pool's spec in the form that the request path wants.
type settings struct {
	protocol    resealv1.BackendPool_Protocol
	serverName  string
	sessionsOff bool
	poolScope   bool

	reuse       resealv1.Connections_Reuse
	maxIdle     int
	maxOpen     int // of maxPerEndpoint and the pool's share of maxPerFleet the smaller
	maxPerFleet int // 0: no limit
	maxPending  int
	maxRequests int
	idleTimeout time.Duration
	maxLifetime time.Duration

	closeTimeout     time.Duration
	connectTimeout   time.Duration
	handshakeTimeout time.Duration
	terms            exchange.Terms
	renegotiates     bool // once, if the server asks
	headerTimeout    time.Duration
	bodyTimeout      time.Duration

	retries       int
	retryConnect  bool
	retryStale    bool
	retryStatuses []int
	check         *resealv1.HealthCheck
	checkTimeout  time.Duration
}

func newSettings(spec *resealv1.BackendPool) *settings {
	connections, timeouts := spec.GetConnections(), spec.GetTimeouts()
	s := &settings{
		protocol:         spec.GetProtocol(),
		serverName:       spec.GetTls().GetServerName(),
		sessionsOff:      spec.GetSessions().GetMode() == resealv1.Sessions_MODE_OFF,
		poolScope:        spec.GetSessions().GetScope() == resealv1.Sessions_SCOPE_POOL,
		reuse:            connections.GetReuse(),
		maxIdle:          int(connections.GetMaxIdlePerEndpoint()),
		maxOpen:          int(connections.GetMaxPerEndpoint()),
		maxPerFleet:      int(connections.GetMaxPerFleet()),
		maxPending:       int(connections.GetMaxPending()),
		maxRequests:      int(connections.GetMaxRequests()),
		idleTimeout:      connections.GetIdleTimeout().AsDuration(),
		maxLifetime:      connections.GetMaxLifetime().AsDuration(),
		closeTimeout:     connections.GetCloseTimeout().AsDuration(),
		connectTimeout:   timeouts.GetConnect().AsDuration(),
		handshakeTimeout: timeouts.GetHandshake().AsDuration(),
		headerTimeout:    timeouts.GetResponseHeader().AsDuration(),
		bodyTimeout:      timeouts.GetIdle().AsDuration(),
		retries:          int(spec.GetRetries().GetAttempts()),
		check:            spec.GetHealthCheck(),
		checkTimeout:     spec.GetHealthCheck().GetTimeout().AsDuration(),
	}
	s.renegotiates = spec.GetTls().GetRenegotiation() == resealv1.BackendTLS_RENEGOTIATION_ONCE
	s.terms = exchange.Terms{
		Wait:          spec.GetSessions().GetCoalesceTimeout().AsDuration(),
		TicketWait:    spec.GetSessions().GetTicketWait().AsDuration(),
		SessionIDsOff: spec.GetSessions().GetSessionIds() == resealv1.Sessions_SESSION_IDS_OFF,
		CryptoTLS:     s.renegotiates,
	}
	s.retryOn(spec.GetRetries().GetOn())
	return s
}

func (s *settings) retryOn(conditions []resealv1.Retries_Condition) {
	s.retryConnect = slices.Contains(conditions, resealv1.Retries_CONDITION_CONNECT_FAILURE)
	s.retryStale = slices.Contains(conditions, resealv1.Retries_CONDITION_STALE_CONNECTION)
	statuses := map[resealv1.Retries_Condition]int{
		resealv1.Retries_CONDITION_502: 502,
		resealv1.Retries_CONDITION_503: 503,
		resealv1.Retries_CONDITION_504: 504,
	}
	for _, condition := range conditions {
		if code, ok := statuses[condition]; ok {
			s.retryStatuses = append(s.retryStatuses, code)
		}
	}
}

// queueTimeout bounds the wait for a connection: what a dial of one's own would
// take at most, with its turn in the queue of handshakes.
func (s *settings) queueTimeout() time.Duration { return s.connectTimeout + 2*s.handshakeTimeout }

// private reports whether connections are not shared between clients from their
// first request on, so that waiters can't count on another's h2 connection.
func (s *settings) private() bool {
	return s.reuse == resealv1.Connections_REUSE_NEVER || s.reuse == resealv1.Connections_REUSE_SAFE ||
		s.reuse == resealv1.Connections_REUSE_AGGRESSIVE
}

// owner is the client connection that a connection served last.
type owner struct {
	client  uint64
	gone    <-chan struct{} // closed when the client's connection is
	private bool            // the client's own for good, see private.go
}

// next is the owner after a call, which may use the connection.
func (o owner) next(call *exchange.Exchange) owner { return owner{call.Client, call.Gone, o.private} }

// left reports whether the client's connection is closed.
func (o owner) left() bool {
	select {
	case <-o.gone:
		return true
	default:
		return false
	}
}

// mayUse reports whether a call may use a connection that has served that many
// requests, the last ones for owner. A connection that served none is new, even
// when it was dialled for another request.
func (s *settings) mayUse(call *exchange.Exchange, served int, owner owner) bool {
	if owner.private {
		return owner.client == call.Client
	}
	switch s.reuse {
	case resealv1.Connections_REUSE_AGGRESSIVE:
		return served == 0 || !call.First || served > 1
	case resealv1.Connections_REUSE_SAFE:
		return served == 0 || !call.First
	case resealv1.Connections_REUSE_NEVER:
		return served == 0 || owner.client == call.Client
	default:
		return true
	}
}

// orphaned reports whether a connection waits in vain: it may serve one client
// only, which is gone.
func (s *settings) orphaned(served int, owner owner) bool {
	return (owner.private || s.reuse == resealv1.Connections_REUSE_NEVER && served > 0) && owner.left()
}

// sparesProven reports whether a call leaves connections that have been reused
// to others as long as it finds one that has not: only those serve the first
// requests of clients, which would otherwise pay for a new connection.
func (s *settings) sparesProven(call *exchange.Exchange) bool {
	return s.reuse == resealv1.Connections_REUSE_AGGRESSIVE && !call.First
}

// reserves reports whether an HTTP/2 connection in use takes requests of one
// client only: a slow answer for one client would hold up those of another
// behind it.
func (s *settings) reserves() bool { return s.reuse == resealv1.Connections_REUSE_SAFE }

// mayShare is mayUse for a stream of an HTTP/2 connection. endpoint.mu is held.
func (s *settings) mayShare(call *exchange.Exchange, c *h2Conn) bool {
	switch {
	case c.owner.private:
		return c.owner.client == call.Client
	case s.reserves() && c.streams > 0:
		return c.owner.client == call.Client
	case s.reuse == resealv1.Connections_REUSE_AGGRESSIVE && call.First && c.served > 0:
		return c.answered // which proves as much as reuse does with HTTP/1
	}
	return s.mayUse(call, c.served, c.owner)
}
