package etcd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// checkInterval is how often the space is looked at.
	checkInterval = 5 * time.Second
	// requestTimeout bounds one request, tidyTimeout one that etcd may be busy
	// with for long.
	requestTimeout = 5 * time.Second
	tidyTimeout    = 2 * time.Minute

	// warnAt and fullAt are shares of the quota: from fullAt on applies are refused,
	// so that what else must be written has the rest.
	warnAt = 0.8
	fullAt = 0.9

	// compactGrowth and compactInterval are after how much new data, and how long
	// after the last compaction, superseded values are dropped.
	compactGrowth   = 64 << 20
	compactInterval = 5 * time.Minute
	// The database file is rewritten when this much of it is unused and that is half
	// of it, at most once in defragInterval: etcd stands still meanwhile. Near the
	// quota it is rewritten whenever that makes room.
	defragFree     = 64 << 20
	defragInterval = time.Minute
)

// ErrFull means that there is no room for what was to be written.
var ErrFull = errors.New("the store is full")

var errNoLeader = errors.New("its cluster has no leader")

// space is what is known of etcd's space. It is immutable.
type space struct {
	embedded bool
	size     int64 // of the database file
	inUse    int64 // bytes of it
	quota    int64 // 0: not known
	noSpace  bool  // etcd takes no writes until an alarm is disarmed
	revision int64
	failure  error // why nothing newer is known
}

func (p *space) share() float64 {
	if p.quota <= 0 {
		return 0
	}
	return float64(p.size) / float64(p.quota)
}

// full is why nothing more should be stored, nil when there is room.
func (p *space) full() error {
	switch {
	case !p.noSpace && p.share() < fullAt:
		return nil
	case p.embedded:
		return fmt.Errorf("%w: its database has %s of %s (--etcd-quota-bytes); delete what is not needed, keep less history (--history-limit, --history-bytes) or restart with a larger quota; \"reseal-controlplane compact\" drops what is superseded while the control plane is stopped",
			ErrFull, bytesText(p.size), bytesText(p.quota))
	}
	return fmt.Errorf("%w: the etcd cluster's database has %s of %s; compact and defragment the cluster and disarm its alarm (etcdctl compact, defrag, alarm disarm; or \"reseal-controlplane compact --etcd-endpoints ...\"), or raise its --quota-backend-bytes",
		ErrFull, bytesText(p.size), bytesText(p.quota))
}

// Full is why nothing more should be stored: an ErrFull that says what to do. It
// is nil when there is room. It makes no request.
func (s *Store) Full() error { return s.space.Load().full() }

// Problem says what does not work, for people; "" when all does. It makes no
// request.
func (s *Store) Problem() string {
	p := s.space.Load()
	if p.failure != nil {
		return fmt.Sprintf("etcd does not answer (%v): changes fail, the last configuration is served", p.failure)
	}
	if err := p.full(); err != nil {
		return err.Error()
	}
	if p.share() >= warnAt {
		return fmt.Sprintf("the store is %.0f%% full: %s of %s; applies are refused from %.0f%% on", 100*p.share(), bytesText(p.size), bytesText(p.quota), 100*fullAt)
	}
	return ""
}

// Status is what is known of the space, and what Problem says. It makes no request.
func (s *Store) Status() *resealv1.StoreStatus {
	p := s.space.Load()
	return &resealv1.StoreStatus{
		SizeBytes: p.size, UsedBytes: p.inUse, QuotaBytes: p.quota, Embedded: p.embedded, Problem: s.Problem(),
	}
}

// Run looks after the space until ctx ends. It returns the error by which the
// embedded store has failed, nil at the end of ctx.
func (s *Store) Run(ctx context.Context) error {
	k := &keeper{store: s}
	ticker := time.NewTicker(s.interval)
	defer ticker.Stop()
	for {
		k.look(ctx)
		select {
		case <-ctx.Done():
			return nil
		case err := <-s.failed():
			return fmt.Errorf("embedded store: %w", err)
		case <-s.fatal.happened:
			return fmt.Errorf("embedded store: %w; %s", s.fatal.err, whatToDo(s.embedded.Config().Dir, s.fatal.err))
		case <-ticker.C:
		}
	}
}

// failed yields the embedded store's error. It blocks for ever with an external
// cluster.
func (s *Store) failed() <-chan error {
	if s.embedded == nil {
		return nil
	}
	return s.embedded.Err()
}

// keeper is what Run remembers from one look to the next.
type keeper struct {
	store     *Store
	last      *space    // of the look before, nil: none
	compacted time.Time // when, zero: not yet
	until     int64     // the revision that was compacted to
	after     int64     // bytes in use after that
	defragged time.Time
	warned    bool
}

func (k *keeper) look(ctx context.Context) {
	s := k.store
	now, err := s.measure(ctx)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		failed := *s.space.Load()
		failed.failure = err
		s.space.Store(&failed)
		return
	}
	s.space.Store(now)
	if s.embedded != nil {
		now = k.tidy(ctx, now)
		s.space.Store(now)
	}
	k.last = now
	k.warn(now)
}

// warn says once that room is short, and once that there is none.
func (k *keeper) warn(now *space) {
	problem := k.store.Problem()
	if problem != "" && !k.warned {
		k.store.log.Warn("room in the store is short", "detail", problem, "bytes", now.size, "in_use", now.inUse, "quota", now.quota)
	}
	k.warned = problem != ""
}

// tidy drops what is superseded, when there is enough of it, and gives its room
// back. It returns what is true then.
func (k *keeper) tidy(ctx context.Context, now *space) *space {
	s := k.store
	if target := k.compactTo(now); target > 0 {
		if err := s.compact(ctx, target); err != nil {
			s.log.Warn("the embedded store can't be compacted", "error", err)
			return now
		}
		k.compacted, k.until = time.Now(), target
		if measured, err := s.measure(ctx); err == nil {
			now = measured
		}
		k.after = now.inUse
	}
	if k.worthDefrag(now) {
		k.defragged = time.Now()
		if err := s.defragment(ctx); err != nil {
			s.log.Warn("the embedded store can't be defragmented", "error", err)
			return now
		}
		s.log.Info("the embedded store was defragmented", "bytes_before", now.size, "took", time.Since(k.defragged).String())
		if measured, err := s.measure(ctx); err == nil {
			now = measured
		}
	}
	if now.noSpace && now.share() < fullAt {
		if err := s.disarm(ctx); err != nil {
			s.log.Warn("the embedded store's alarm can't be disarmed", "error", err)
			return now
		}
		s.log.Info("the embedded store takes writes again")
		now.noSpace = false
	}
	return now
}

// compactTo is the revision to compact to, 0 for none: that of the look before,
// so that whoever reads at a revision or follows from one has time to.
func (k *keeper) compactTo(now *space) int64 {
	if k.last == nil {
		if now.noSpace {
			return now.revision // nobody reads yet
		}
		return 0
	}
	due := now.inUse-k.after > compactGrowth || time.Since(k.compacted) > compactInterval || now.noSpace || now.share() > 0.5
	if !due || k.last.revision <= max(k.until, 1) {
		return 0
	}
	return k.last.revision
}

func (k *keeper) worthDefrag(now *space) bool {
	free := now.size - now.inUse
	switch {
	case now.noSpace && free > now.quota/20, now.share() > warnAt && free > now.quota/10:
		return true
	case time.Since(k.defragged) < defragInterval:
		return false
	}
	return free > defragFree && free > now.size/2
}

// measure asks etcd. Of the members of a cluster the fullest counts.
func (s *Store) measure(ctx context.Context) (*space, error) {
	var fullest *space
	var failure error
	for _, endpoint := range s.Client.Endpoints() {
		bounded, cancel := context.WithTimeout(ctx, requestTimeout)
		answer, err := s.Client.Status(bounded, endpoint)
		cancel()
		if status.Code(err) == codes.PermissionDenied {
			continue // with an etcd that tells it to administrators only
		}
		if err != nil {
			failure = err
			continue
		}
		found := &space{
			embedded: s.embedded != nil, size: answer.DbSize, inUse: answer.DbSizeInUse, quota: answer.DbSizeQuota,
			revision: answer.Header.GetRevision(),
		}
		for _, text := range answer.Errors {
			found.noSpace = found.noSpace || strings.Contains(text, "NOSPACE")
			if strings.Contains(text, "no leader") {
				found.failure = errNoLeader
			}
		}
		if fullest == nil || found.noSpace && !fullest.noSpace || found.share() > fullest.share() {
			fullest = found
		}
	}
	switch {
	case fullest != nil:
		return fullest, nil
	case failure != nil:
		return nil, failure
	}
	return &space{}, nil
}

func (s *Store) compact(ctx context.Context, revision int64) error {
	ctx, cancel := context.WithTimeout(ctx, tidyTimeout)
	defer cancel()
	_, err := s.Client.Compact(ctx, revision, clientv3.WithCompactPhysical())
	if err != nil && strings.Contains(err.Error(), "has been compacted") {
		return nil
	}
	return err
}

func (s *Store) defragment(ctx context.Context) error {
	for _, endpoint := range s.Client.Endpoints() {
		bounded, cancel := context.WithTimeout(ctx, tidyTimeout)
		_, err := s.Client.Defragment(bounded, endpoint)
		cancel()
		if err != nil {
			return fmt.Errorf("%s: %w", endpoint, err)
		}
	}
	return nil
}

func (s *Store) disarm(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	_, err := s.Client.AlarmDisarm(ctx, &clientv3.AlarmMember{})
	return err
}

// Tidy drops all superseded values, gives their room back and disarms alarms if
// that made room. It is for a command: in a cluster that others use too, they lose
// the revisions of the past. It returns the size of the database before and after.
func (s *Store) Tidy(ctx context.Context) (before, after int64, err error) {
	found, err := s.measure(ctx)
	if err != nil {
		return 0, 0, err
	}
	if err := s.compact(ctx, found.revision); err != nil {
		return found.size, found.size, fmt.Errorf("compact: %w", err)
	}
	if err := s.defragment(ctx); err != nil {
		return found.size, found.size, fmt.Errorf("defragment: %w", err)
	}
	left, err := s.measure(ctx)
	if err != nil {
		return found.size, found.size, err
	}
	s.space.Store(left)
	if left.share() >= fullAt {
		return found.size, left.size, left.full()
	}
	if err := s.disarm(ctx); err != nil {
		return found.size, left.size, fmt.Errorf("disarm the alarm: %w", err)
	}
	return found.size, left.size, nil
}

func bytesText(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d KiB", n>>10)
}

var (
	bytesDesc = prometheus.NewDesc("reseal_store_bytes",
		"Size of etcd's database: the file (size), how much of it is in use (in_use), and its limit (quota).", []string{"kind"}, nil)
	writableDesc = prometheus.NewDesc("reseal_store_writable",
		"1 when etcd answers and has room for changes.", nil, nil)
)

// collector shows the newest look.
type collector struct{ store *Store }

func (c *collector) Describe(descs chan<- *prometheus.Desc) {
	descs <- bytesDesc
	descs <- writableDesc
}

func (c *collector) Collect(metrics chan<- prometheus.Metric) {
	p := c.store.space.Load()
	for kind, value := range map[string]int64{"size": p.size, "in_use": p.inUse, "quota": p.quota} {
		metrics <- prometheus.MustNewConstMetric(bytesDesc, prometheus.GaugeValue, float64(value), kind)
	}
	writable := 1.0
	if p.failure != nil || p.full() != nil {
		writable = 0
	}
	metrics <- prometheus.MustNewConstMetric(writableDesc, prometheus.GaugeValue, writable)
}
