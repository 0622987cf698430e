/* A stand-in for VSS towards a requester, compiled from MinGW's own vsbackup.h: what the agent calls must be at the place where that header
 * has it. It records the order of the calls, plays writers, and drives the hardware provider (the class object that the agent registers in
 * this process) in the order that VSS does.
 *
 * STANDIN_LOG        file that gets one line for each call
 * STANDIN_BEHAVIOUR  file with KEY=VALUE lines, read at each InitializeForBackup:
 *   naa=HEX32        the LUN of every volume             sql=PATH  vm=PATH  where these writers' files lie (no line: no such writer)
 *   freeze_ms=N      writers take so long to freeze, before the hold begins
 *   hold_ms=N        VSS lets go after this (10000)
 *   fail=prepare|freeze|thaw|gone|nocommit   what goes wrong
 */
#define COBJMACROS
#define INITGUID
#include <windows.h>
#include <initguid.h>
#include <vss.h>
#include <vswriter.h>
#include <vsbackup.h>
#include <vsprov.h>
#include <stdio.h>

static const GUID class_of_provider = {0x1d6e4b52, 0x8f0a, 0x4a3b, {0x9a, 0x55, 0xc1, 0xf0, 0x7c, 0x2e, 0x84, 0xd3}};
static const GUID id_of_provider = {0x9c7a10f4, 0x2f4b, 0x4c8e, {0xb1, 0xa0, 0x5f, 0x0e, 0x53, 0xa6, 0x7d, 0x11}};
static const GUID sql_class = {0xa65faa63, 0x5ea8, 0x4ebc, {0x9d, 0xbd, 0xa0, 0xc4, 0xdb, 0x26, 0x91, 0x2a}};
static const GUID vm_class = {0x66841cd4, 0x6ded, 0x4f4b, {0x8f, 0x17, 0xfd, 0x23, 0xf8, 0xdd, 0xc3, 0xde}};
static const GUID other_class = {0xe8132975, 0x6f93, 0x4464, {0xa5, 0x3e, 0x10, 0x50, 0x25, 0x3a, 0xe2, 0x20}};
static const GUID none;

enum { SQL, VM, OTHER, WRITERS };
static struct { char naa[64], sql[512], vm[512], fail[64]; int freeze_ms, hold_ms; } be;
static LONG done; /* DoSnapshotSet has ended */
static CRITICAL_SECTION lock;

static void note(const char *format, ...)
{
    const char *path = getenv("STANDIN_LOG");
    FILE *file = path ? fopen(path, "a") : NULL;
    va_list arguments;
    if (!file) return;
    EnterCriticalSection(&lock);
    va_start(arguments, format);
    vfprintf(file, format, arguments);
    va_end(arguments);
    fputc('\n', file);
    fclose(file);
    LeaveCriticalSection(&lock);
}

static void value(const char *line, const char *key, char *out, size_t size)
{
    size_t len = strlen(key);
    if (!strncmp(line, key, len) && line[len] == '=') snprintf(out, size, "%s", line + len + 1);
}

static void read_behaviour(void)
{
    const char *path = getenv("STANDIN_BEHAVIOUR");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[600], number[32];
    memset(&be, 0, sizeof be);
    be.hold_ms = 10000;
    done = 0;
    if (!file) return;
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\r\n")] = 0;
        value(line, "naa", be.naa, sizeof be.naa);
        value(line, "sql", be.sql, sizeof be.sql);
        value(line, "vm", be.vm, sizeof be.vm);
        value(line, "fail", be.fail, sizeof be.fail);
        number[0] = 0, value(line, "freeze_ms", number, sizeof number);
        if (number[0]) be.freeze_ms = atoi(number);
        number[0] = 0, value(line, "hold_ms", number, sizeof number);
        if (number[0]) be.hold_ms = atoi(number);
    }
    fclose(file);
}

static BSTR text(const char *from)
{
    wchar_t wide[600];
    mbstowcs(wide, from, 600);
    return SysAllocString(wide);
}

/* IVssAsync: done at once, or a thread's. */
struct task { IVssAsync head; LONG count, cancelled; HRESULT state; };
static HRESULT WINAPI task_query(IVssAsync *this, REFIID id, void **out) { *out = this; IVssAsync_AddRef(this); return S_OK; }
static ULONG WINAPI task_add(IVssAsync *this) { return InterlockedIncrement(&((struct task *)this)->count); }
static ULONG WINAPI task_release(IVssAsync *this)
{
    LONG left = InterlockedDecrement(&((struct task *)this)->count);
    if (!left) free(this);
    return left;
}
static HRESULT WINAPI task_cancel(IVssAsync *this) { note("Cancel"); InterlockedExchange(&((struct task *)this)->cancelled, 1); return S_OK; }
static HRESULT WINAPI task_wait(IVssAsync *this, DWORD ms) { Sleep(ms > 50 ? 50 : ms); return S_OK; }
static HRESULT WINAPI task_status(IVssAsync *this, HRESULT *state, INT *reserved) { *state = ((struct task *)this)->state; return S_OK; }
static IVssAsyncVtbl task_table = {task_query, task_add, task_release, task_cancel, task_wait, task_status};

static struct task *task(HRESULT state, IVssAsync **out)
{
    struct task *task = calloc(1, sizeof *task);
    task->head.lpVtbl = &task_table;
    task->count = 1;
    task->state = state;
    *out = &task->head;
    return task;
}
static HRESULT finished(IVssAsync **out) { task(VSS_S_ASYNC_FINISHED, out); return S_OK; }

/* Writers' metadata: one component each. */
struct object { void *table; LONG count; int writer; };
static HRESULT WINAPI any_query(void *this, REFIID id, void **out) { *out = this; ((struct object *)this)->count++; return S_OK; }
static ULONG WINAPI any_add(void *this) { return ++((struct object *)this)->count; }
static ULONG WINAPI any_release(void *this)
{
    LONG left = --((struct object *)this)->count;
    if (!left) free(this);
    return left;
}
static void *object(void *table, int writer)
{
    struct object *made = calloc(1, sizeof *made);
    made->table = table, made->count = 1, made->writer = writer;
    return made;
}
#define UNKNOWN(type) (HRESULT(WINAPI *)(type *, REFIID, void **))any_query, (ULONG(WINAPI *)(type *))any_add, (ULONG(WINAPI *)(type *))any_release

static HRESULT WINAPI file_path(IVssWMFiledesc *this, BSTR *out)
{
    *out = text(((struct object *)this)->writer == SQL ? be.sql : be.vm);
    return S_OK;
}
static IVssWMFiledescVtbl file_table = {UNKNOWN(IVssWMFiledesc), file_path};

static HRESULT WINAPI component_info(IVssWMComponent *this, PVSSCOMPONENTINFO *out)
{
    VSS_COMPONENTINFO *info = calloc(1, sizeof *info);
    int sql = ((struct object *)this)->writer == SQL;
    info->type = sql ? VSS_CT_DATABASE : VSS_CT_FILEGROUP;
    info->bstrLogicalPath = sql ? text("SRV\\INSTANCE") : NULL;
    info->bstrComponentName = text(sql ? "sales" : "6A1C22B0-VM");
    info->bstrCaption = text(sql ? "" : "web01");
    info->bSelectable = 1;
    info->cDatabases = sql ? 1 : 0;
    info->cLogFiles = sql ? 1 : 0;
    info->cFileCount = sql ? 0 : 1;
    *out = info;
    return S_OK;
}
static HRESULT WINAPI component_free(IVssWMComponent *this, PVSSCOMPONENTINFO info)
{
    SysFreeString(info->bstrLogicalPath), SysFreeString(info->bstrComponentName), SysFreeString(info->bstrCaption);
    free((void *)info);
    return S_OK;
}
static HRESULT WINAPI component_file(IVssWMComponent *this, UINT index, IVssWMFiledesc **out)
{
    *out = object(&file_table, ((struct object *)this)->writer);
    return S_OK;
}
static IVssWMComponentVtbl component_table = {
    UNKNOWN(IVssWMComponent), component_info, component_free, component_file, component_file, component_file};

static int writer_at(UINT index)
{
    int have[WRITERS] = {be.sql[0] != 0, be.vm[0] != 0, 1}, writer;
    for (writer = 0; writer < WRITERS; writer++)
        if (have[writer] && !index--) return writer;
    return -1;
}
static UINT writers(void) { UINT count = 0; while (writer_at(count) >= 0) count++; return count; }
static const GUID *class_of(int writer) { return writer == SQL ? &sql_class : writer == VM ? &vm_class : &other_class; }
static BSTR name_of(int writer)
{
    return text(writer == SQL ? "SqlServerWriter" : writer == VM ? "Microsoft Hyper-V VSS Writer" : "System Writer");
}
static GUID instance_of(int writer) { GUID id = {0x11110000 + writer, 1, 2, {3}}; return id; }

static HRESULT WINAPI meta_identity(IVssExamineWriterMetadata *this, VSS_ID *instance, VSS_ID *class, BSTR *name, VSS_USAGE_TYPE *usage,
                                    VSS_SOURCE_TYPE *source)
{
    int writer = ((struct object *)this)->writer;
    *instance = instance_of(writer), *class = *class_of(writer), *name = name_of(writer);
    *usage = VSS_UT_USERDATA, *source = VSS_ST_TRANSACTEDDB;
    return S_OK;
}
static HRESULT WINAPI meta_counts(IVssExamineWriterMetadata *this, UINT *include, UINT *exclude, UINT *components)
{
    *include = *exclude = 0, *components = ((struct object *)this)->writer == OTHER ? 0 : 1;
    return S_OK;
}
static HRESULT WINAPI meta_component(IVssExamineWriterMetadata *this, UINT index, IVssWMComponent **out)
{
    *out = object(&component_table, ((struct object *)this)->writer);
    return S_OK;
}
static IVssExamineWriterMetadataVtbl meta_table = {
    UNKNOWN(IVssExamineWriterMetadata), meta_identity, meta_counts, NULL, NULL, meta_component};

/* The backup. */
#define MAX_VOLUMES 16
struct backup { IVssBackupComponents head; LONG count; VSS_ID set; wchar_t volumes[MAX_VOLUMES][512]; VSS_ID snapshots[MAX_VOLUMES]; int volume_count; };

static HRESULT WINAPI b_query(IVssBackupComponents *this, REFIID id, void **out) { *out = this; return S_OK; }
static ULONG WINAPI b_add(IVssBackupComponents *this) { return ++((struct backup *)this)->count; }
static ULONG WINAPI b_release(IVssBackupComponents *this)
{
    LONG left = --((struct backup *)this)->count;
    if (!left) { note("Release"); free(this); }
    return left;
}
static HRESULT WINAPI b_initialize(IVssBackupComponents *this, BSTR xml) { read_behaviour(); note("InitializeForBackup"); return xml ? E_INVALIDARG : S_OK; }
static HRESULT WINAPI b_state(IVssBackupComponents *this, boolean select, boolean boot, VSS_BACKUP_TYPE type, boolean partial)
{
    note("SetBackupState select=%d type=%d partial=%d", select, type, partial);
    return S_OK;
}
static HRESULT WINAPI b_gather_metadata(IVssBackupComponents *this, IVssAsync **out) { note("GatherWriterMetadata"); return finished(out); }
static HRESULT WINAPI b_metadata_count(IVssBackupComponents *this, UINT *count) { *count = writers(); return S_OK; }
static HRESULT WINAPI b_metadata(IVssBackupComponents *this, UINT index, VSS_ID *instance, IVssExamineWriterMetadata **out)
{
    *instance = instance_of(writer_at(index));
    *out = object(&meta_table, writer_at(index));
    return S_OK;
}
static HRESULT WINAPI b_free_metadata(IVssBackupComponents *this) { return S_OK; }
static HRESULT WINAPI b_component(IVssBackupComponents *this, VSS_ID instance, VSS_ID class, VSS_COMPONENT_TYPE type, LPCWSTR path, LPCWSTR name)
{
    note("AddComponent %ls %ls type=%d", path ? path : L"-", name, type);
    return IsEqualGUID(&class, &sql_class) || IsEqualGUID(&class, &vm_class) ? S_OK : E_INVALIDARG;
}
static HRESULT WINAPI b_prepare(IVssBackupComponents *this, IVssAsync **out) { note("PrepareForBackup"); return finished(out); }
static HRESULT WINAPI b_abort(IVssBackupComponents *this) { note("AbortBackup"); return S_OK; }
static HRESULT WINAPI b_gather_status(IVssBackupComponents *this, IVssAsync **out) { note("GatherWriterStatus"); return finished(out); }
static HRESULT WINAPI b_status_count(IVssBackupComponents *this, UINT *count)
{
    *count = writers() - (done && !strcmp(be.fail, "gone") ? 1 : 0);
    return S_OK;
}
static HRESULT WINAPI b_free_status(IVssBackupComponents *this) { return S_OK; }
static HRESULT WINAPI b_status(IVssBackupComponents *this, UINT index, VSS_ID *instance, VSS_ID *class, BSTR *name, VSS_WRITER_STATE *state,
                               HRESULT *failure)
{
    int writer = writer_at(index + (done && !strcmp(be.fail, "gone") ? 1 : 0));
    *instance = instance_of(writer), *class = *class_of(writer), *name = name_of(writer);
    *state = done ? VSS_WS_WAITING_FOR_BACKUP_COMPLETE : VSS_WS_STABLE, *failure = S_OK;
    if (writer == SQL && !done && !strcmp(be.fail, "prepare")) *state = VSS_WS_FAILED_AT_PREPARE_BACKUP, *failure = 0x800423f4;
    if (writer == SQL && done && !strcmp(be.fail, "thaw")) *state = VSS_WS_FAILED_AT_THAW, *failure = 0x800423f2;
    return S_OK;
}
static HRESULT WINAPI b_succeeded(IVssBackupComponents *this, VSS_ID instance, VSS_ID class, VSS_COMPONENT_TYPE type, LPCWSTR path, LPCWSTR name,
                                  boolean succeeded)
{
    note("SetBackupSucceeded %ls %d", name, succeeded);
    return S_OK;
}
static HRESULT WINAPI b_save(IVssBackupComponents *this, BSTR *xml) { *xml = text("<BACKUP_COMPONENTS standin=\"yes\"/>"); return S_OK; }
static HRESULT WINAPI b_complete(IVssBackupComponents *this, IVssAsync **out) { note("BackupComplete"); return finished(out); }
static HRESULT WINAPI b_context(IVssBackupComponents *this, LONG context) { note("SetContext %lx", context); return S_OK; }
static HRESULT WINAPI b_start(IVssBackupComponents *this, VSS_ID *set)
{
    struct backup *backup = (struct backup *)this;
    note("StartSnapshotSet");
    CoCreateGuid(&backup->set);
    *set = backup->set;
    return S_OK;
}
static HRESULT WINAPI b_volume(IVssBackupComponents *this, VSS_PWSZ volume, VSS_ID provider, VSS_ID *snapshot)
{
    struct backup *backup = (struct backup *)this;
    note("AddToSnapshotSet %ls", volume);
    if (!IsEqualGUID(&provider, &id_of_provider)) return VSS_E_PROVIDER_NOT_REGISTERED;
    if (backup->volume_count == MAX_VOLUMES) return VSS_E_MAXIMUM_NUMBER_OF_VOLUMES_REACHED;
    wcsncpy(backup->volumes[backup->volume_count], volume, 511);
    CoCreateGuid(&backup->snapshots[backup->volume_count]);
    *snapshot = backup->snapshots[backup->volume_count++];
    return S_OK;
}

/* What VSS does in DoSnapshotSet. */
static void describe(VDS_LUN_INFORMATION *info, VDS_STORAGE_IDENTIFIER *id, BYTE *naa)
{
    int index;
    unsigned byte;
    memset(info, 0, sizeof *info), memset(id, 0, sizeof *id);
    for (index = 0; index < 16 && sscanf(be.naa + 2 * index, "%2x", &byte) == 1; index++) naa[index] = byte;
    id->m_CodeSet = VDSStorageIdCodeSetBinary, id->m_Type = VDSStorageIdTypeFCPHName;
    id->m_cbIdentifier = 16, id->m_rgbIdentifier = naa;
    info->m_version = VER_VDS_LUN_INFORMATION;
    info->m_BusType = VDSBusTypeiScsi;
    info->m_szVendorId = (char *)"STILLPNT", info->m_szProductId = (char *)"VIRTUAL-DISK", info->m_szSerialNumber = (char *)"0001";
    info->m_deviceIdDescriptor.m_version = 1, info->m_deviceIdDescriptor.m_cIdentifiers = 1;
    info->m_deviceIdDescriptor.m_rgIdentifiers = id;
}

struct work { struct backup *backup; struct task *task; };

static HRESULT commit(struct backup *backup, struct task *task)
{
    IClassFactory *factory = NULL;
    IVssHardwareSnapshotProvider *hardware = NULL;
    IVssProviderCreateSnapshotSet *set = NULL;
    VDS_LUN_INFORMATION lun, target;
    VDS_STORAGE_IDENTIFIER id;
    BYTE naa[16] = {0};
    VSS_PWSZ device = (VSS_PWSZ)L"\\\\?\\scsi#standin";
    WINBOOL supported = FALSE;
    DWORD began;
    int index;
    HRESULT code = CoGetClassObject(&class_of_provider, CLSCTX_LOCAL_SERVER, NULL, &IID_IClassFactory, (void **)&factory);
    if (SUCCEEDED(code)) code = IClassFactory_CreateInstance(factory, NULL, &IID_IVssHardwareSnapshotProvider, (void **)&hardware);
    if (SUCCEEDED(code)) code = IVssHardwareSnapshotProvider_QueryInterface(hardware, &IID_IVssProviderCreateSnapshotSet, (void **)&set);
    note("provider %08lx", code);
    if (FAILED(code)) return code;
    describe(&lun, &id, naa);
    code = IVssHardwareSnapshotProvider_AreLunsSupported(hardware, 1, 0, &device, &lun, &supported);
    note("AreLunsSupported %08lx %d", code, supported);
    if (SUCCEEDED(code) && !supported) code = VSS_E_VOLUME_NOT_SUPPORTED_BY_PROVIDER;
    for (index = 0; SUCCEEDED(code) && index < backup->volume_count; index++) {
        code = IVssHardwareSnapshotProvider_BeginPrepareSnapshot(hardware, backup->set, backup->snapshots[index], 0, 1, &device, &lun);
        note("BeginPrepareSnapshot %08lx", code);
    }
    if (SUCCEEDED(code)) { code = IVssProviderCreateSnapshotSet_EndPrepareSnapshots(set, backup->set); note("EndPrepareSnapshots %08lx", code); }
    /* Writers freeze now: up to 60 s, before the hold of 10 s. */
    for (index = 0; SUCCEEDED(code) && index < be.freeze_ms / 20 && !task->cancelled; index++) Sleep(20);
    if (task->cancelled) code = VSS_S_ASYNC_CANCELLED;
    if (!strcmp(be.fail, "freeze")) code = VSS_E_UNEXPECTED_WRITER_ERROR;
    note("writers frozen %08lx", code);
    if (code == S_OK) { code = IVssProviderCreateSnapshotSet_PreCommitSnapshots(set, backup->set); note("PreCommitSnapshots %08lx", code); }
    began = GetTickCount();
    if (code == S_OK && strcmp(be.fail, "nocommit")) { code = IVssProviderCreateSnapshotSet_CommitSnapshots(set, backup->set); note("CommitSnapshots %08lx", code); }
    if (code == S_OK && GetTickCount() - began > (DWORD)be.hold_ms) code = VSS_E_HOLD_WRITES_TIMEOUT;
    if (code == S_OK && strcmp(be.fail, "nocommit")) {
        code = IVssProviderCreateSnapshotSet_PostCommitSnapshots(set, backup->set, backup->volume_count);
        note("PostCommitSnapshots %08lx", code);
        memset(&target, 0, sizeof target);
        if (SUCCEEDED(code)) code = IVssHardwareSnapshotProvider_GetTargetLuns(hardware, 1, &device, &lun, &target);
        note("GetTargetLuns %08lx %s", code, SUCCEEDED(code) ? target.m_szSerialNumber : "");
        if (SUCCEEDED(code)) code = IVssProviderCreateSnapshotSet_PreFinalCommitSnapshots(set, backup->set);
        if (SUCCEEDED(code)) code = IVssProviderCreateSnapshotSet_PostFinalCommitSnapshots(set, backup->set);
    }
    if (code != S_OK) note("AbortSnapshots %08lx", IVssProviderCreateSnapshotSet_AbortSnapshots(set, backup->set));
    IVssProviderCreateSnapshotSet_Release(set);
    IVssHardwareSnapshotProvider_Release(hardware);
    IClassFactory_Release(factory);
    return code;
}

static DWORD WINAPI snapshot_thread(void *argument)
{
    struct work *work = argument;
    HRESULT code;
    CoInitializeEx(NULL, COINIT_MULTITHREADED);
    code = commit(work->backup, work->task);
    note("DoSnapshotSet ends %08lx", code);
    InterlockedExchange(&done, 1);
    work->task->state = code == S_OK ? VSS_S_ASYNC_FINISHED : code;
    IVssAsync_Release(&work->task->head);
    IVssBackupComponents_Release(&work->backup->head);
    free(work);
    return 0;
}

static HRESULT WINAPI b_do(IVssBackupComponents *this, IVssAsync **out)
{
    struct work *work = calloc(1, sizeof *work);
    note("DoSnapshotSet");
    work->backup = (struct backup *)this;
    work->task = task(VSS_S_ASYNC_PENDING, out);
    IVssAsync_AddRef(*out), IVssBackupComponents_AddRef(this);
    CloseHandle(CreateThread(NULL, 0, snapshot_thread, work, 0, NULL));
    return S_OK;
}

static IVssBackupComponentsVtbl backup_table = {
    .QueryInterface = b_query, .AddRef = b_add, .Release = b_release, .InitializeForBackup = b_initialize, .SetBackupState = b_state,
    .GatherWriterMetadata = b_gather_metadata, .GetWriterMetadataCount = b_metadata_count, .GetWriterMetadata = b_metadata,
    .FreeWriterMetadata = b_free_metadata, .AddComponent = b_component, .PrepareForBackup = b_prepare, .AbortBackup = b_abort,
    .GatherWriterStatus = b_gather_status, .GetWriterStatusCount = b_status_count, .FreeWriterStatus = b_free_status,
    .GetWriterStatus = b_status, .SetBackupSucceeded = b_succeeded, .SaveAsXML = b_save, .BackupComplete = b_complete,
    .SetContext = b_context, .StartSnapshotSet = b_start, .AddToSnapshotSet = b_volume, .DoSnapshotSet = b_do};

__declspec(dllexport) HRESULT STDAPICALLTYPE CreateVssBackupComponentsInternal(IVssBackupComponents **out)
{
    struct backup *backup = calloc(1, sizeof *backup);
    backup->head.lpVtbl = &backup_table;
    backup->count = 1;
    *out = &backup->head;
    return S_OK;
}

BOOL WINAPI DllMain(HINSTANCE module, DWORD why, void *reserved)
{
    if (why == DLL_PROCESS_ATTACH) InitializeCriticalSection(&lock);
    return TRUE;
}
