// Package sessions relays the TLS sessions that edges hold with backends to
// other edges of the same pool. They are sealed from edge to edge; the relay
// keeps nothing but what is under way, in memory.
package sessions

import (
	"context"
	"crypto/x509"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// entitleInterval is how often the relay checks who is entitled to what.
	entitleInterval = 5 * time.Second
	// revokedFor is how long edges that join hear of a revocation: no session
	// lives longer on another edge.
	revokedFor = time.Hour

	maxMembers = 16384
	maxRevoked = 1024
)

// Config is what a relay needs. It is read once, by New.
type Config struct {
	// Edge names the caller of a stream, with the labels that its join token
	// gave it; nil: those that it says. An error that carries no gRPC status is
	// PERMISSION_DENIED. Required.
	Edge func(ctx context.Context) (id string, labels map[string]string, err error)
	// Pools returns the names of the pools with sharing: fleet in the
	// configuration of an edge with these labels. It is called at each join, and
	// for each set of labels when the revision has changed. Required.
	Pools func(labels map[string]string) []string
	// Revision names the configuration that Pools answers from, or one before it.
	// It is asked every 5 s, and at each join before Pools is. Required.
	Revision func() int64
	// Roots returns the fleet's authority, to verify the certificates that edges
	// send. Nil: the edges alone verify them.
	Roots func() *x509.CertPool
	// Logger is for the operator of this process. Default: nowhere.
	Logger *slog.Logger
}

// Server implements SessionService.
type Server struct {
	resealv1.UnimplementedSessionServiceServer

	config  Config
	lines   *fleet.Lines
	stopped chan struct{} // closed when Run has ended

	mu       sync.Mutex
	members  map[string]*member // by edge, those of other replicas too
	shadowed map[string]*member // edges of others that are, still or already, connected here
	outlets  map[string]*outlet // to other replicas
	streams  int                // members and those that have not joined yet
	freed    map[*member]bool   // those that were full, and are no longer
	revoked  map[string]time.Time
	seeds    uint64 // number of the newest
	queued   int    // bytes of all offers under way
	compared int    // pairs of members so far: what the work grows with
}

// New makes a relay.
func New(config Config) *Server {
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	return &Server{
		config:   config,
		lines:    fleet.NewLines(),
		stopped:  make(chan struct{}),
		members:  map[string]*member{},
		shadowed: map[string]*member{},
		outlets:  map[string]*outlet{},
		freed:    map[*member]bool{},
		revoked:  map[string]time.Time{},
	}
}

// Run follows who is entitled to what until ctx ends, and then ends all streams.
// It may be called once and returns nil.
func (s *Server) Run(ctx context.Context) error {
	defer s.lines.End(fleet.ErrStopping)
	defer close(s.stopped)
	ticker := time.NewTicker(entitleInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			s.entitleAll()
		case <-ctx.Done():
			return nil
		}
	}
}

// Revoke ends an edge's stream and has the other edges drop the sessions that
// came from it or through it.
func (s *Server) Revoke(edge string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgetRevoked()
	if len(s.revoked) < maxRevoked {
		s.revoked[edge] = time.Now()
	}
	if m := s.members[edge]; m != nil {
		s.leaveLocked(m)
		m.end(status.Errorf(codes.PermissionDenied, "edge %q was revoked", edge))
	}
	for _, m := range s.members {
		m.push(gone(edge, true))
	}
}

func (s *Server) forgetRevoked() {
	maps.DeleteFunc(s.revoked, func(_ string, at time.Time) bool { return time.Since(at) > revokedFor })
}

func gone(edge string, revoked bool) *resealv1.ExchangeResponse {
	return &resealv1.ExchangeResponse{Message: &resealv1.ExchangeResponse_Gone{
		Gone: &resealv1.ExchangeGone{Edge: edge, Revoked: revoked},
	}}
}

// entitleAll follows a changed configuration. It looks again only at members that
// were entitled by another one, links only those whose pools that changes, and
// each two of them once.
func (s *Server) entitleAll() {
	revision := s.config.Revision()
	allowed := map[string]map[string]bool{}
	for key, labels := range s.outdated(revision) {
		allowed[key] = nameSet(s.config.Pools(labels))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var changed []*member
	added, fresh := map[*member][]string{}, map[string]bool{}
	if len(allowed) > 0 {
		for _, m := range s.members {
			pools, ok := allowed[labelsKey(m.labels)]
			if !ok || m.revision == revision {
				continue
			}
			if names, differs := m.entitle(pools, revision); differs {
				changed, added[m] = append(changed, m), names
				for _, pool := range names {
					fresh[pool] = true
				}
			}
		}
	}
	s.relink(changed...)
	s.fill()
	holders := s.holders(fresh)
	for _, m := range changed {
		if m.outlet != nil {
			continue // its own replica sees to that
		}
		s.seed(m, added[m], holders, false)
	}
}

// outdated are the labels, by their key, of members that were entitled by another
// revision.
func (s *Server) outdated(revision int64) map[string]map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	found := map[string]map[string]string{}
	for _, m := range s.members {
		if m.revision != revision {
			found[labelsKey(m.labels)] = m.labels
		}
	}
	return found
}

func labelsKey(labels map[string]string) string {
	var key strings.Builder
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		key.WriteString(name + "\x00" + labels[name] + "\x00")
	}
	return key.String()
}
