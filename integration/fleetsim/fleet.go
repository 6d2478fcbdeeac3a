// Package fleetsim simulates edges: thousands in one process, each with an identity
// and a TLS connection of its own and all that an edge says that shares no sessions.
// They connect as edges do (edge/link), but serve nobody.
package fleetsim

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/reseal/reseal/edge/link"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Config is what a Fleet needs.
type Config struct {
	// Addresses of the control plane's replicas. Required.
	Addresses []string
	// Size is that of the configuration: edges report as many pools and listeners.
	Size Size
}

// Fleet is a number of simulated edges.
type Fleet struct {
	edges     []*edge
	pools     []*resealv1.Stats
	listeners []*resealv1.Stats
	cancel    context.CancelFunc
	running   sync.WaitGroup

	counts struct{ dials, refused, failed, full, delta, empty, updateBytes, reports, reportBytes atomic.Int64 }

	mu     sync.Mutex
	losses map[string]int
}

// Counts are what happened so far, in all edges.
type Counts struct {
	// Dials are TCP connections that a replica took; Failed those of them that came
	// to no session. Refused are those that nobody took.
	Dials, Failed, Refused int64
	// Full, Delta and Empty are updates by their kind, UpdateBytes the size of all.
	Full, Delta, Empty, UpdateBytes int64
	// Reports is how many were sent, ReportBytes their size.
	Reports, ReportBytes int64
}

// Minus is what happened since before.
func (c Counts) Minus(before Counts) Counts {
	return Counts{
		Dials: c.Dials - before.Dials, Failed: c.Failed - before.Failed, Refused: c.Refused - before.Refused,
		Full: c.Full - before.Full, Delta: c.Delta - before.Delta, Empty: c.Empty - before.Empty,
		UpdateBytes: c.UpdateBytes - before.UpdateBytes,
		Reports:     c.Reports - before.Reports, ReportBytes: c.ReportBytes - before.ReportBytes,
	}
}

// Start starts an edge for each identity, all at once. They run until Stop. The
// control plane must be on this machine.
func Start(config Config, identities []*Identity) (*Fleet, error) {
	ctx, cancel := context.WithCancel(context.Background())
	f := &Fleet{cancel: cancel, losses: map[string]int{}}
	f.pools, f.listeners = config.Size.counted()
	for i, identity := range identities {
		own := &net.TCPAddr{IP: net.IPv4(127, byte(1+i>>16), byte(i>>8), byte(i))}
		e := &edge{fleet: f, Identity: identity, bootID: "boot-" + identity.id, startedAt: time.Now(), dialer: net.Dialer{LocalAddr: own}}
		var err error
		e.conn, err = link.Dial(link.Config{
			Addresses:   config.Addresses,
			Shuffled:    true,
			Credentials: counted{credentials.NewTLS(clientTLS(identity.roots, &identity.pair)), f},
			Dial:        e.dial,
		})
		if err != nil {
			f.Stop()
			return nil, err
		}
		e.link = link.New(e.conn, f.lost, resealv1.FeedService_Sync_FullMethodName,
			resealv1.KeyringService_Hold_FullMethodName, resealv1.TallyService_Report_FullMethodName)
		f.edges = append(f.edges, e)
		f.running.Go(func() { _ = e.link.Run(ctx) })
		for _, serve := range []func(context.Context) error{e.sync, e.hold, e.report} {
			f.running.Go(func() { link.Keep(ctx, serve, f.lost) })
		}
	}
	return f, nil
}

// Stop ends all edges and waits for that.
func (f *Fleet) Stop() {
	f.cancel()
	f.running.Wait()
	for _, e := range f.edges {
		_ = e.conn.Close()
	}
}

// Counts returns what happened so far.
func (f *Fleet) Counts() Counts {
	c := &f.counts
	return Counts{
		Dials: c.dials.Load(), Failed: c.failed.Load(), Refused: c.refused.Load(),
		Full: c.full.Load(), Delta: c.delta.Load(), Empty: c.empty.Load(), UpdateBytes: c.updateBytes.Load(),
		Reports: c.reports.Load(), ReportBytes: c.reportBytes.Load(),
	}
}

// Losses are the reasons for which streams ended so far, with their number.
func (f *Fleet) Losses() map[string]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	losses := map[string]int{}
	for text, n := range f.losses {
		losses[text] = n
	}
	return losses
}

// maxLosses bounds the reasons that are kept apart.
const maxLosses = 100

func (f *Fleet) lost(err error, _ time.Duration) {
	text := err.Error()
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, known := f.losses[text]; !known && len(f.losses) >= maxLosses {
		text = "others"
	}
	f.losses[text]++
}

// dial connects from an address of the edge's own, as edges are hosts of their own.
func (e *edge) dial(ctx context.Context, address string) (net.Conn, error) {
	f := e.fleet
	conn, err := e.dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		f.counts.refused.Add(1)
		return nil, err
	}
	f.counts.dials.Add(1)
	return conn, nil
}

// counted counts the handshakes that fail.
type counted struct {
	credentials.TransportCredentials
	fleet *Fleet
}

func (c counted) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		c.fleet.counts.failed.Add(1)
	}
	return conn, info, err
}

func (c counted) Clone() credentials.TransportCredentials {
	return counted{c.TransportCredentials.Clone(), c.fleet}
}

// Moments are when each edge came to something, in order of time.
type Moments []time.Time

// Last is that of the last edge.
func (m Moments) Last() time.Time { return m[len(m)-1] }

// P99 is when 99 of 100 edges were there.
func (m Moments) P99() time.Time { return m[(len(m)*99-1)/100] }

// Connected waits until all streams of all edges are served, and were so after a
// moment.
func (f *Fleet) Connected(ctx context.Context, after time.Time) (Moments, error) {
	return f.await(ctx, "connected", func(e *edge) (bool, time.Time) {
		return e.up == allStreams && e.upAt.After(after), e.upAt
	})
}

// Acked waits until all edges have acked a revision or a newer one.
func (f *Fleet) Acked(ctx context.Context, revision int64) (Moments, error) {
	return f.await(ctx, "at the revision", func(e *edge) (bool, time.Time) { return e.revision >= revision, e.ackedAt })
}

// Encrypting waits until all edges encrypt with an epoch or a newer one.
func (f *Fleet) Encrypting(ctx context.Context, epoch uint64) (Moments, error) {
	return f.await(ctx, "encrypting with the epoch", func(e *edge) (bool, time.Time) { return e.epoch >= epoch, e.encryptsAt })
}

// await looks at all edges again and again.
func (f *Fleet) await(ctx context.Context, what string, reached func(*edge) (bool, time.Time)) (Moments, error) {
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for {
		var moments Moments
		for _, e := range f.edges {
			e.mu.Lock()
			if done, at := reached(e); done {
				moments = append(moments, at)
			}
			e.mu.Unlock()
		}
		if len(moments) == len(f.edges) {
			slices.SortFunc(moments, time.Time.Compare)
			return moments, nil
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("%d of %d edges are %s: %w", len(moments), len(f.edges), what, ctx.Err())
		}
	}
}
