package audit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// named are the fields by which requests say what they are about.
type named interface {
	GetId() string
}

// about says what the calls of a method that changes something are about. Changes of
// resources are not here: their entries are in the transactions that make them.
var about = map[string]func(user string, request any) string{
	resealv1.FleetService_DrainEdge_FullMethodName:     edgeOf,
	resealv1.FleetService_PauseRollout_FullMethodName:  theRollout,
	resealv1.FleetService_ResumeRollout_FullMethodName: theRollout,
	resealv1.FleetService_UndoRollout_FullMethodName:   theRollout,
	resealv1.KeyringService_Rotate_FullMethodName:      keyringOf,
	resealv1.KeyringService_Revoke_FullMethodName:      keyringOf,

	resealv1.EnrollmentService_CreateToken_FullMethodName: edgeOf,
	resealv1.EnrollmentService_RevokeToken_FullMethodName: func(_ string, request any) string {
		return "token/" + request.(interface{ GetTokenId() string }).GetTokenId()
	},
	resealv1.EnrollmentService_Enroll_FullMethodName:     edgeOf,
	resealv1.EnrollmentService_RevokeEdge_FullMethodName: edgeOf,
	resealv1.EnrollmentService_CreateUser_FullMethodName: userOf,
	resealv1.EnrollmentService_RevokeUser_FullMethodName: userOf,
	resealv1.EnrollmentService_RenewUser_FullMethodName: func(user string, _ any) string {
		_, name, _ := strings.Cut(user, "/")
		return "user/" + name
	},
	resealv1.BackupService_Backup_FullMethodName: func(string, any) string { return "backup" },
}

func edgeOf(_ string, request any) string { return "edge/" + request.(named).GetId() }

func userOf(_ string, request any) string {
	return "user/" + request.(interface{ GetName() string }).GetName()
}

func keyringOf(_ string, request any) string {
	name := request.(interface{ GetKeyring() string }).GetKeyring()
	if name == "" {
		name = resealv1.DefaultKeyring
	}
	return "keyring/" + name
}

func theRollout(string, any) string { return "rollout" }

// UnaryInterceptor records the calls that change something, when they have. It stands
// behind the one that knows the caller.
func (l *Log) UnaryInterceptor(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	response, err := handler(ctx, request)
	l.done(ctx, info.FullMethod, request, err)
	return response, err
}

// StreamInterceptor is UnaryInterceptor for streams: they are recorded when they
// begin.
func (l *Log) StreamInterceptor(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if about[info.FullMethod] != nil {
		l.done(stream.Context(), info.FullMethod, nil, nil)
	}
	return handler(server, stream)
}

// done records a call that changed something, or failed to.
func (l *Log) done(ctx context.Context, method string, request any, err error) {
	describe := about[method]
	user := l.config.Caller(ctx)
	dry, isDry := request.(interface{ GetDryRun() bool })
	// What a replica passes on was recorded by the one that was called.
	if describe == nil || strings.HasPrefix(user, "replica/") || isDry && dry.GetDryRun() {
		return
	}
	entry := l.newEntry(ctx, user, method)
	entry.Resources = []*resealv1.AuditedResource{{Resource: describe(user, request)}}
	switch said := request.(type) {
	case interface{ GetReason() string }:
		entry.Message = said.GetReason()
	case interface{ GetMessage() string }:
		entry.Message = said.GetMessage()
	}
	if err != nil {
		l.queue(entry, err)
		return
	}
	// It was done, whatever becomes of the caller.
	if err := l.Append(context.WithoutCancel(ctx), entry); err != nil {
		l.config.Logger.Error("a call that changed something could not be recorded", "user", user, "source", entry.GetSource(),
			"action", entry.GetAction(), "resource", entry.GetResources()[0].GetResource(), "message", entry.GetMessage(), "error", err)
	}
}

// codeName is a code as gRPC's documentation writes it.
func codeName(code codes.Code) string {
	var name strings.Builder
	for i, r := range code.String() {
		if i > 1 && 'A' <= r && r <= 'Z' { // not within OK
			name.WriteByte('_')
		}
		name.WriteRune(r)
	}
	return strings.ToUpper(name.String())
}

// Change is what the transaction of a change of resources needs to record it.
func (l *Log) Change(ctx context.Context, message string, changes []*resealv1.Change) ([]clientv3.Cmp, []clientv3.Op, error) {
	method, _ := grpc.Method(ctx)
	entry := l.newEntry(ctx, l.config.Caller(ctx), method)
	entry.Message = message
	for i, c := range changes {
		if i == maxResources {
			entry.MoreResources = uint32(len(changes) - i)
			break
		}
		entry.Resources = append(entry.Resources, &resealv1.AuditedResource{
			Resource: c.GetResource().Key(), Change: resealv1.Label(c.GetAction()),
			Before: fingerprint(c.GetBefore()), After: fingerprint(c.GetAfter()),
			Diff: changedLines(l.config.Diff(c.GetBefore(), c.GetAfter(), c.GetChangedSecrets()...)),
		})
	}
	return l.Extend(ctx, entry)
}

// fingerprint is the hash of a resource without secrets, "" of none.
func fingerprint(r *resealv1.Resource) string {
	if r == nil {
		return ""
	}
	if r.GetMetadata() != nil {
		r = proto.CloneOf(r)
		r.Metadata.Revision = 0 // what a change makes has none yet
	}
	data, err := protojson.Marshal(r)
	if err != nil {
		return ""
	}
	// Through encoding/json, which sorts and has no white space.
	var plain any
	if json.Unmarshal(data, &plain) != nil {
		return ""
	}
	if data, err = json.Marshal(plain); err != nil {
		return ""
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// changedLines leaves of a unified diff the lines that were added and removed.
func changedLines(diff string) string {
	var kept strings.Builder
	for line := range strings.Lines(diff) {
		switch {
		case strings.HasPrefix(line, "+++"), strings.HasPrefix(line, "---"):
		case strings.HasPrefix(line, "+"), strings.HasPrefix(line, "-"):
			kept.WriteString(line)
		}
		if kept.Len() > maxDiff {
			break
		}
	}
	return kept.String()
}
