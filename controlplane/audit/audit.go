// Package audit records who did what: every change and calls that were refused, in
// etcd and, on request, in a file. Entries form a chain, each naming the hash of the
// one before.
package audit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// Limit is how many entries are kept: some 10 MiB as they usually are, weeks of
	// changes, and of refusals as far as they are recorded.
	Limit = 10_000
	// trimEvery is how many entries are made before the oldest are removed, at once.
	trimEvery = 100

	// MaxEntry bounds an entry, so that one fits into a transaction beside a change.
	MaxEntry     = 32 << 10
	maxResources = 100
	maxDiff      = 2 << 10 // bytes, of a resource
	maxDiffs     = 8 << 10 // bytes, of an entry
	maxText      = 1 << 10 // bytes, of a message, an error or a name

	requestTimeout = 5 * time.Second
	// appendAttempts bounds how often an entry is written again because another one
	// came first. In each round one of them wins.
	appendAttempts = 32
)

// Refused and failed calls that are recorded, of each replica: nobody must be able to
// fill the log, and push out of it what happened, by calls that come to nothing, such
// as a revoked edge that tries again for ever. At these rates they are 432 a day and
// replica, so that the entries last for weeks.
var (
	refusedRate   = rate.Every(5 * time.Minute) // of callers with a certificate
	anonymousRate = rate.Every(10 * time.Minute)
)

const (
	refusedBurst   = 20
	anonymousBurst = 10
	maxPending     = 64 // that wait for the store
)

// ErrTaken means that another entry came first.
var ErrTaken = errors.New("another audit entry came first")

// Config is what a Log needs. It is read once, by New.
type Config struct {
	// Client reaches etcd. Required.
	Client *clientv3.Client
	// Prefix is put before every key; those of this package start with
	// Prefix+"audit/". Default "/reseal/v1/".
	Prefix string
	// Caller names who makes a call: "<role>/<name>". Required.
	Caller func(context.Context) string
	// Diff is a unified diff of a resource before and after, without secrets. Default:
	// entries have none.
	Diff func(before, after *resealv1.Resource, changedSecrets ...string) string
	// File gets every entry of all replicas as a line of JSON, mode 0600: what was made
	// while this replica was away follows at the next start, as far as it is kept. It
	// may be moved away at any time. Default: none.
	File string
	// Logger is for the operator of this process. Default: nowhere.
	Logger *slog.Logger
}

// Log is the audit log as one replica sees it. Its methods may be called concurrently.
type Log struct {
	config Config

	known, anonymous *rate.Limiter
	pending          chan *resealv1.AuditEntry
	suppressed       atomic.Uint64
}

// New makes a log that can be appended to; Run does the rest.
func New(config Config) *Log {
	if config.Prefix == "" {
		config.Prefix = "/reseal/v1/"
	}
	if config.Diff == nil {
		config.Diff = func(_, _ *resealv1.Resource, _ ...string) string { return "" }
	}
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	return &Log{
		config:    config,
		known:     rate.NewLimiter(refusedRate, refusedBurst),
		anonymous: rate.NewLimiter(anonymousRate, anonymousBurst),
		pending:   make(chan *resealv1.AuditEntry, maxPending),
	}
}

// Run records refused calls, follows the log, and removes its oldest entries, until ctx
// ends. It may be called once and returns nil.
func (l *Log) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { l.record(ctx); return nil })
	group.Go(func() error { l.keep(ctx); return nil })
	return group.Wait()
}

// record appends what Refused was told.
func (l *Log) record(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case entry := <-l.pending:
			if err := l.Append(ctx, entry); err != nil && ctx.Err() == nil {
				l.config.Logger.Warn("a refused call could not be recorded", "user", entry.GetUser(), "action", entry.GetAction(), "error", err)
				l.suppressed.Add(1)
			}
		}
	}
}

// head is the newest entry, as stored under audit/head.
type head struct {
	Number uint64 `json:"number"`
	Hash   string `json:"hash"`
}

func (l *Log) headKey() string { return l.config.Prefix + "audit/head" }

func (l *Log) entryKey(number uint64) string {
	return fmt.Sprintf("%saudit/entries/%020d", l.config.Prefix, number)
}

// readHead returns the newest entry, and the revision of its key.
func (l *Log) readHead(ctx context.Context) (head, int64, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	answer, err := l.config.Client.Get(ctx, l.headKey())
	if err != nil || len(answer.Kvs) == 0 {
		return head{}, 0, err
	}
	var h head
	if err := json.Unmarshal(answer.Kvs[0].Value, &h); err != nil {
		return head{}, 0, fmt.Errorf("%s can't be read: %w", l.headKey(), err)
	}
	return h, answer.Kvs[0].ModRevision, nil
}

// Extend returns what a transaction needs to make entry a part of it: when a guard
// does not hold, another entry came first, and Extend has to be called again. It
// numbers the entry.
func (l *Log) Extend(ctx context.Context, entry *resealv1.AuditEntry) ([]clientv3.Cmp, []clientv3.Op, error) {
	newest, revision, err := l.readHead(ctx)
	if err != nil {
		return nil, nil, err
	}
	entry.Number, entry.Previous = newest.Number+1, newest.Hash
	entry.Time = timestamppb.New(time.Now().UTC().Truncate(time.Millisecond))
	bound(entry)
	// protojson's white space differs from build to build; what is stored is the record.
	record, err := protojson.Marshal(entry)
	if err != nil {
		return nil, nil, err
	}
	value, err := json.Marshal(head{Number: entry.GetNumber(), Hash: hashOf(record)})
	if err != nil {
		return nil, nil, err
	}
	return []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(l.headKey()), "=", revision)},
		[]clientv3.Op{clientv3.OpPut(l.entryKey(entry.GetNumber()), string(record)), clientv3.OpPut(l.headKey(), string(value))}, nil
}

// Append records an entry by itself.
func (l *Log) Append(ctx context.Context, entry *resealv1.AuditEntry) error {
	for attempt := range appendAttempts {
		guards, ops, err := l.Extend(ctx, entry)
		if err != nil {
			return err
		}
		bounded, cancel := context.WithTimeout(ctx, requestTimeout)
		answer, err := l.config.Client.Txn(bounded).If(guards...).Then(ops...).Commit()
		cancel()
		if err != nil || answer.Succeeded {
			return err
		}
		if pause(ctx, rand.N(time.Duration(attempt+1)*time.Millisecond)); ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return ErrTaken
}

// Refused notes a call that was refused. It does not block.
func (l *Log) Refused(ctx context.Context, user, method string, err error) {
	l.queue(l.newEntry(ctx, user, method), err)
}

// queue hands the entry of a call that came to nothing to record, unless many did: then
// it is counted.
func (l *Log) queue(entry *resealv1.AuditEntry, err error) {
	limiter := l.known
	if !strings.Contains(entry.GetUser(), "/") {
		limiter = l.anonymous
	}
	if !limiter.Allow() {
		l.suppressed.Add(1)
		return
	}
	st := status.Convert(err)
	entry.Outcome, entry.Error, entry.Suppressed = codeName(st.Code()), st.Message(), l.suppressed.Swap(0)
	select {
	case l.pending <- entry:
	default:
		l.suppressed.Add(entry.GetSuppressed() + 1)
	}
}

// newEntry says who calls what, and from where.
func (l *Log) newEntry(ctx context.Context, user, method string) *resealv1.AuditEntry {
	service, name, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(method, "/"), "reseal.v1."), "/")
	entry := &resealv1.AuditEntry{User: user, Action: service + "." + name, Outcome: "OK"}
	if name == "" {
		entry.Action = method
	}
	if p, ok := peer.FromContext(ctx); ok {
		entry.Source = p.Addr.String()
	}
	return entry
}

// bound cuts what is too long, so that an entry has less than MaxEntry bytes.
func bound(entry *resealv1.AuditEntry) {
	entry.User, entry.Action, entry.Message, entry.Error = cut(entry.GetUser()), cut(entry.GetAction()), cut(entry.GetMessage()), cut(entry.GetError())
	if over := len(entry.GetResources()) - maxResources; over > 0 {
		entry.Resources, entry.MoreResources = entry.GetResources()[:maxResources], entry.GetMoreResources()+uint32(over)
	}
	left := maxDiffs
	for _, r := range entry.GetResources() {
		r.Diff = clip(r.GetDiff(), min(maxDiff, left))
		left -= len(r.GetDiff())
	}
	for len(entry.GetResources()) > 0 && proto.Size(entry) > MaxEntry/2 { // JSON may take more, names being long
		entry.Resources, entry.MoreResources = entry.GetResources()[:len(entry.GetResources())-1], entry.GetMoreResources()+1
	}
}

func cut(text string) string { return clip(text, maxText) }

// clip shortens text to some bytes and says so.
func clip(text string, bytes int) string {
	const mark = " [cut]"
	if len(text) <= bytes {
		return strings.ToValidUTF8(text, "\uFFFD")
	}
	return strings.ToValidUTF8(text[:max(0, bytes-len(mark))], "") + mark[:min(bytes, len(mark))]
}

func hashOf(record []byte) string {
	sum := sha256.Sum256(record)
	return hex.EncodeToString(sum[:])
}
