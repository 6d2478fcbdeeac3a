package link

import (
	"context"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/test/bufconn"
)

// world are replicas in memory, by address.
type world struct {
	mu       sync.Mutex
	replicas map[string]*bufconn.Listener
	stalled  time.Time // until then no replica says anything
}

func newWorld(t *testing.T, addresses ...string) *world {
	w := &world{replicas: map[string]*bufconn.Listener{}}
	for _, address := range addresses {
		listener := bufconn.Listen(64 << 10)
		w.replicas[address] = listener
		server := grpc.NewServer()
		healthpb.RegisterHealthServer(server, health.NewServer())
		ended := make(chan error, 1)
		go func() { ended <- server.Serve(slow{listener, w}) }()
		t.Cleanup(func() {
			server.Stop()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
	return w
}

func (w *world) dial(ctx context.Context, address string) (net.Conn, error) {
	w.mu.Lock()
	listener := w.replicas[address]
	w.mu.Unlock()
	if listener == nil {
		<-ctx.Done() // a host that is gone
		return nil, ctx.Err()
	}
	return listener.DialContext(ctx)
}

func (w *world) stall(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stalled = time.Now().Add(d)
}

func (w *world) patience() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Until(w.stalled)
}

// slow are connections of replicas that are busy.
type slow struct {
	net.Listener
	world *world
}

func (l slow) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return slowConn{conn, l.world}, nil
}

type slowConn struct {
	net.Conn
	world *world
}

func (c slowConn) Write(p []byte) (int, error) {
	time.Sleep(c.world.patience())
	return c.Conn.Write(p)
}

// watching is an edge with a stream that is open.
func (w *world) watching(t *testing.T, mover *Mover, addresses ...string) (*grpc.ClientConn, grpc.ServerStreamingClient[healthpb.HealthCheckResponse]) {
	t.Helper()
	conn, err := Dial(Config{Addresses: addresses, Credentials: insecure.NewCredentials(), Dial: w.dial, Mover: mover})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	stream, err := healthpb.NewHealthClient(conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	return conn, stream
}

// A replica that is busy with a fleet that comes back is not given up: whoever did would
// have it begin again.
func TestBusyReplicasAreNotGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "one")
		conn, stream := w.watching(t, nil, "one")
		ended := make(chan error, 1)
		go func() { _, err := stream.Recv(); ended <- err }()
		w.stall(25 * time.Second)
		time.Sleep(24 * time.Second)
		synctest.Wait()
		select {
		case err := <-ended:
			t.Errorf("a replica that was busy is given up: %v", err)
		default:
		}
		w.stall(time.Hour)
		time.Sleep(pingAfter + pingTimeout + 2*time.Second)
		synctest.Wait()
		select {
		case <-ended:
		default:
			t.Error("one that never says anything is kept")
		}
		w.stall(0)
		_ = conn.Close()
	})
}

// An edge that is asked to goes to another replica, and stays where it is when there is
// none.
func TestMove(t *testing.T) {
	for name, test := range map[string]struct {
		addresses []string // of the edge
		there     []string // replicas that answer
		preferred []string
		moves     bool
	}{
		"to the one that is preferred":            {[]string{"one", "two", "three"}, []string{"one", "two", "three"}, []string{"three"}, true},
		"to any when none of those is configured": {[]string{"one", "two"}, []string{"one", "two"}, []string{"elsewhere"}, true},
		"nowhere without another address":         {[]string{"one"}, []string{"one"}, nil, false},
		"nowhere when no other answers":           {[]string{"one", "two"}, []string{"one"}, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, test.there...)
				mover := NewMover()
				conn, stream := w.watching(t, mover, test.addresses...)
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error, 1)
				go func() { ended <- mover.Run(ctx) }()
				before := mover.now()
				broken := make(chan error, 1)
				go func() { _, err := stream.Recv(); broken <- err }()
				if can := mover.Move(test.preferred); can != (len(test.addresses) > 1) {
					t.Errorf("Move returned %t", can)
				}
				time.Sleep(moveTimeout + time.Second)
				synctest.Wait()
				moved := mover.now() != before
				if moved != test.moves {
					t.Errorf("from %s to %s", before, mover.now())
				}
				if len(test.preferred) == 1 && w.replicas[test.preferred[0]] != nil && mover.now() != test.preferred[0] {
					t.Errorf("it is at %s", mover.now())
				}
				select {
				case <-broken:
					if !moved {
						t.Error("the stream has ended, though there is nowhere to go")
					}
				default:
					if moved {
						t.Error("the old connection goes on")
					}
				}
				if _, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
					t.Error(err)
				}
				cancel()
				if err := <-ended; err != nil {
					t.Error(err)
				}
				_ = conn.Close()
			})
		})
	}
}

// now is the address that is in use.
func (m *Mover) now() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.current.address
}
