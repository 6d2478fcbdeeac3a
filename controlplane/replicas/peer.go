package replicas

import (
	"context"
	cryptorand "crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// askTimeout bounds one question to another replica.
	askTimeout = 2 * time.Second
	// maxAsked is how many questions to one replica are under way at the same time.
	// Others wait their turn, within askTimeout.
	maxAsked = 8
	// maxAnswer bounds an answer, in bytes: ten thousand edges with room to spare.
	maxAnswer = 64 << 20

	// Pauses between two conversations with a replica.
	firstPause = 200 * time.Millisecond
	mostPause  = 3 * time.Second
)

var errLeaseLost = errors.New("the lease was lost")

// peer is another replica.
type peer struct {
	id    string
	conn  *grpc.ClientConn
	turns chan struct{} // one for each question under way

	// Guarded by Group.mu.

	said     record
	lost     time.Time // when its key vanished, zero: it is there
	answered time.Time // when it answered last
}

// newPeer connects when the first question is asked.
func newPeer(said record, config *tls.Config) (*peer, error) {
	conn, err := grpc.NewClient("passthrough:///"+said.Address,
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.3, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
	)
	if err != nil {
		return nil, err
	}
	return &peer{id: said.ID, said: said, conn: conn, turns: make(chan struct{}, maxAsked)}, nil
}

func (p *peer) close() { _ = p.conn.Close() }

// turn waits until a question may be asked. done gives the turn back.
func (p *peer) turn(ctx context.Context) (done func(), err error) {
	select {
	case p.turns <- struct{}{}:
		return func() { <-p.turns }, nil
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// answer is what a replica said.
type answer[T any] struct {
	replica string
	said    T
	err     error
}

// ask asks all other replicas at once, each for askTimeout at most.
func ask[T any](ctx context.Context, g *Group, question func(context.Context, grpc.ClientConnInterface) (T, error)) []answer[T] {
	peers, _ := g.others()
	answers := make([]answer[T], len(peers))
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var all sync.WaitGroup
	for i, p := range peers {
		all.Go(func() {
			answers[i].replica = p.id
			done, err := p.turn(ctx)
			if err != nil {
				answers[i].err = err
				return
			}
			defer done()
			answers[i].said, answers[i].err = question(ctx, p.conn)
			g.heard(p, answers[i].err)
		})
	}
	all.Wait()
	return answers
}

// askAll asks the others while this replica answers itself.
func askAll[T any](
	ctx context.Context, g *Group, own func(context.Context) (T, error), question func(context.Context, grpc.ClientConnInterface) (T, error),
) (here answer[T], others []answer[T]) {
	var answering sync.WaitGroup
	answering.Go(func() { here.said, here.err = own(ctx) })
	others = ask(ctx, g, question)
	answering.Wait()
	return here, others
}

// heard notes whether a replica answered.
func (g *Group) heard(p *peer, err error) {
	if silent(err) {
		g.metrics.unanswered.Inc()
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	p.answered = time.Now()
}

// silent tells whether an error means that a replica did not answer.
func silent(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Unimplemented,
		codes.Unauthenticated, codes.PermissionDenied, codes.ResourceExhausted:
		return true
	}
	return false
}

// unanswered names the replicas that did not answer.
func unanswered[T any](g *Group, answers []answer[T]) []*resealv1.UnansweredReplica {
	var missing []*resealv1.UnansweredReplica
	for _, a := range answers {
		if silent(a.err) {
			missing = append(missing, g.missing(a.replica, a.err))
		}
	}
	return missing
}

// missing describes a replica that did not answer.
func (g *Group) missing(id string, err error) *resealv1.UnansweredReplica {
	g.mu.Lock()
	defer g.mu.Unlock()
	m := &resealv1.UnansweredReplica{Id: id, Reason: reason(err)}
	if p := g.peers[id]; p != nil {
		m.Address = p.said.Address
		if !p.lost.IsZero() {
			m.Reason += fmt.Sprintf(" (it left etcd %s ago)", time.Since(p.lost).Round(time.Second))
		}
	}
	return m
}

// reason is why a replica did not answer, for people.
func reason(err error) string {
	text := status.Convert(err).Message()
	if status.Code(err) == codes.DeadlineExceeded || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Sprintf("no answer within %s", askTimeout)
	}
	// What comes from the transport tells more of gRPC than of the replica.
	if _, dial, ok := strings.Cut(text, "dial tcp "); ok {
		return strings.Trim(dial[strings.LastIndex(dial, ": ")+1:], ` "`)
	}
	for _, transport := range []string{"connection error", "error reading ", "connection reset", "broken pipe", "transport is closing"} {
		if strings.Contains(text, transport) {
			return "the connection broke"
		}
	}
	return text
}

func randomID() string {
	id := make([]byte, 8)
	_, _ = cryptorand.Read(id) // never fails (crypto/rand)
	return hex.EncodeToString(id)
}

// Each runs talk with each of the other replicas until ctx ends: again, after a
// pause, when it ends while the replica is known, and with those that come.
func (g *Group) Each(ctx context.Context, talk func(ctx context.Context, id string, conn grpc.ClientConnInterface) error) error {
	var talks sync.WaitGroup
	defer talks.Wait()
	running := map[*peer]context.CancelFunc{}
	for {
		peers, changed := g.others()
		for _, p := range peers {
			if running[p] == nil {
				inner, cancel := context.WithCancel(ctx)
				running[p] = cancel
				talks.Go(func() { g.keepTalking(inner, p, talk) })
			}
		}
		for p, cancel := range running {
			if !slices.Contains(peers, p) {
				cancel()
				delete(running, p)
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			for _, cancel := range running {
				cancel()
			}
			return nil
		}
	}
}

func (g *Group) keepTalking(ctx context.Context, p *peer, talk func(context.Context, string, grpc.ClientConnInterface) error) {
	for pause := firstPause; ctx.Err() == nil; {
		begun := time.Now()
		err := talk(ctx, p.id, p.conn)
		if ctx.Err() != nil {
			return
		}
		if time.Since(begun) > mostPause {
			pause = firstPause
		}
		g.config.Logger.Debug("a conversation with a replica ended", "replica", p.id, "error", err, "again_in", pause)
		timer := time.NewTimer(pause/2 + rand.N(pause/2))
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		pause = min(2*pause, mostPause)
	}
}
