package gate

import (
	"log/slog"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc/credentials"
)

// slow are credentials whose handshake reads a byte, and then computes until it is
// let go.
type slow struct {
	credentials.TransportCredentials
	computing atomic.Int64
	let       chan struct{}
}

func (s *slow) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if _, err := raw.Read(make([]byte, 1)); err != nil {
		return nil, nil, err
	}
	s.computing.Add(1)
	defer s.computing.Add(-1)
	<-s.let
	return raw, nil, nil
}

// TestTurns: however many connect, and however many of them say nothing, as many
// handshakes compute as there are processors.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const silent, others = 30, 60
		g := New(Limits{All: 1000, Anonymous: 1000, PerSource: 1000}, slog.New(slog.DiscardHandler))
		inner := &slow{let: make(chan struct{})}
		handshaker := g.Credentials(inner)
		var quiet, running sync.WaitGroup
		shake := func(done *sync.WaitGroup, fails bool) net.Conn {
			ours, theirs := net.Pipe()
			done.Go(func() {
				c := g.enter(ours)
				if _, _, err := handshaker.ServerHandshake(c); (err != nil) != fails {
					t.Errorf("the handshake ends with %v", err)
				}
				_ = c.Close()
			})
			return theirs
		}
		var peers []net.Conn
		for range silent {
			peers = append(peers, shake(&quiet, true))
		}
		for range others {
			peer := shake(&running, false)
			peers = append(peers, peer)
			running.Go(func() { _, _ = peer.Write([]byte{1}) })
		}
		for left := others; left > 0; left-- {
			synctest.Wait()
			if computing := int(inner.computing.Load()); computing != min(runtime.GOMAXPROCS(0), left) {
				t.Errorf("%d handshakes compute at once, %d wait", computing, left)
			}
			inner.let <- struct{}{}
		}
		running.Wait()
		for _, peer := range peers {
			_ = peer.Close()
		}
		quiet.Wait()
		if len(g.turns) != 0 {
			t.Errorf("%d turns are not given back", len(g.turns))
		}
	})
}
