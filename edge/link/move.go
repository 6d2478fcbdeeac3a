package link

import (
	"context"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

// moveTimeout bounds how long an edge that was asked to move tries to.
const moveTimeout = 3 * time.Second

// Mover moves a connection to another replica. It belongs to one Dial, which must be
// done before Run is called.
type Mover struct {
	asked     chan []string // the newest wish
	addresses []string
	replicas  *manual.Resolver
	conn      *grpc.ClientConn

	mu        sync.Mutex
	current   dialled       // the newest connection
	connected chan struct{} // closed with the next one
}

// NewMover makes a Mover for Config.Mover.
func NewMover() *Mover {
	return &Mover{asked: make(chan []string, 1), connected: make(chan struct{})}
}

// Move asks to connect to another replica, one of those addresses if the
// configuration has them. It does not wait, and returns false when the configuration
// has no other replica's address.
func (m *Mover) Move(preferred []string) bool {
	if len(m.addresses) < 2 {
		return false
	}
	select {
	case m.asked <- preferred:
	default: // the move before is under way
	}
	return true
}

// Run moves when it is asked to, until ctx ends. It returns nil. The present
// connection ends when there is a new one: streams break then, and find the new one at
// once. When there is no other address, or no other replica answers within 3 s, all
// stays as it is.
func (m *Mover) Run(ctx context.Context) error {
	for {
		select {
		case preferred := <-m.asked:
			m.move(ctx, preferred)
		case <-ctx.Done():
			return nil
		}
	}
}

func (m *Mover) move(ctx context.Context, preferred []string) {
	m.mu.Lock()
	before, connected := m.current, m.connected
	m.mu.Unlock()
	others := slices.DeleteFunc(slices.Clone(m.addresses), func(a string) bool { return a == before.address })
	wanted := slices.DeleteFunc(slices.Clone(others), func(a string) bool { return !slices.Contains(preferred, a) })
	if len(wanted) == 0 {
		wanted = others
	}
	if before.Conn == nil || len(wanted) == 0 {
		return
	}
	// gRPC lets what is on the old connection go on, and makes a new one.
	m.replicas.UpdateState(stateOf(wanted))
	defer m.replicas.UpdateState(stateOf(m.addresses)) // one that is in use stays in use
	m.conn.Connect()
	ctx, cancel := context.WithTimeout(ctx, moveTimeout)
	defer cancel()
	select {
	case <-connected:
	case <-ctx.Done():
		return
	}
	// Only now is there somewhere to go: with other addresses before, gRPC would begin
	// again, at the first.
	for state := m.conn.GetState(); state != connectivity.Ready; state = m.conn.GetState() {
		if !m.conn.WaitForStateChange(ctx, state) {
			return
		}
	}
	_ = before.Close()
}

func stateOf(addresses []string) resolver.State {
	var state resolver.State
	for _, address := range addresses {
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: address}}})
	}
	return state
}

// attach has m hear of the connections that are made.
func (m *Mover) attach(config *Config, replicas *manual.Resolver) {
	m.addresses, m.replicas = config.Addresses, replicas
	dial := config.Dial
	config.Dial = func(ctx context.Context, address string) (net.Conn, error) {
		conn, err := dial(ctx, address)
		if err != nil {
			return nil, err
		}
		return dialled{conn, address}, nil
	}
	config.Credentials = &noted{config.Credentials, m}
}

// dialled is a TCP connection to a replica.
type dialled struct {
	net.Conn
	address string
}

// noted are credentials that tell a Mover of each connection whose handshake is done.
type noted struct {
	credentials.TransportCredentials
	mover *Mover
}

// ClientHandshake implements credentials.TransportCredentials.
func (n *noted) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secure, info, err := n.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if to, ok := raw.(dialled); ok && err == nil {
		n.mover.mu.Lock()
		defer n.mover.mu.Unlock()
		n.mover.current = to
		close(n.mover.connected)
		n.mover.connected = make(chan struct{})
	}
	return secure, info, err
}

// Clone implements credentials.TransportCredentials.
func (n *noted) Clone() credentials.TransportCredentials {
	return &noted{n.TransportCredentials.Clone(), n.mover}
}
